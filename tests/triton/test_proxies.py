"""Tests that a deployment's own connections never use the proxies of the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdctl import watchers
from pdserve.config import Gateway
from tests.clients import generate, stub, wait_linked, wait_until
from tests.commandline import Pdctl
from tests.servers import Running, emulated_deployment, free_ports

pytestmark = pytest.mark.triton

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.fixture(scope="module")
def pdctl(tmp_path_factory: pytest.TempPathFactory) -> Pdctl:
    """Run a gateway and a worker, with proxies that do not exist."""
    folder = tmp_path_factory.mktemp("proxies")
    (port,) = free_ports(1)
    proxy = f"http://127.0.0.1:{port}"
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    proxies = {form: proxy for name in PROXIES for form in (name, name.upper())}
    deployment = emulated_deployment(folder, {}, gateway=Gateway(channel="grpc"))
    (whole,) = deployment.servers
    gateway = msgspec.structs.replace(whole, name="gateway", prefill=(), decode=())
    worker = msgspec.structs.replace(whole, name="worker", gateway=False)
    deployment = msgspec.structs.replace(deployment, servers=(gateway, worker))
    return Pdctl(deployment, folder, environment=kept | proxies)


@pytest.fixture(scope="module")
def server(pdctl: Pdctl) -> Iterator[Running]:
    with pdctl.up() as running:
        yield running


def test_every_command_reaches_the_servers(pdctl: Pdctl, server: Running) -> None:
    wait_linked(server)
    assert {one["state"] for one in json.loads(pdctl("status", "--json"))} == {"ready"}
    assert [one["ok"] for one in json.loads(pdctl("probe", "--json"))] == [True]
    said = json.loads(pdctl("chat", "Hello", "--json", "--max-tokens", "4"))
    assert said["finish_reason"]
    pdctl("links")  # it ends with 3 if a pair has no link
    pdctl("reload")


def test_instances_are_reached_and_looked_after(server: Running) -> None:
    """The gateway reaches its instances, and the watchdog its probes: nothing has been repaired."""
    assert generate(server, text_input="The sky is", max_tokens=4).finish_reason
    for one in server.servers:
        wait_until(lambda one=one: proven(one.folder), 30)
        state = watchers.reported(one.folder)
        assert state is not None
        assert {thing["repairs"] for thing in state["things"].values()} == {0}


def test_a_model_is_loaded_again(server: Running) -> None:
    worker = server.servers[1]
    killed = stub(server, "decode_0")
    killed.kill()
    wait_until(lambda: not worker.ready("decode_0"), 10)
    wait_until(lambda: worker.ready("decode_0"), 60)

    assert stub(server, "decode_0").pid != killed.pid


def proven(folder: Path) -> bool:
    """Tell whether a watchdog has had an answer to every probe."""
    state = watchers.reported(folder)
    return state is not None and all(thing["answered"] for thing in state["things"].values())
