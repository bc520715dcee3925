"""Tests for servers on several hosts: a prefill, a decode, and the gateway before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pdctl import footprint
from pdctl.errors import ServerError
from pdctl.server import Server
from pdctl.status import status
from pdserve.config import Deployment
from pdserve.config import Server as Spec
from tests import clients
from tests.hosts.network import Network, hosts
from tests.hosts.servers import running_on
from tests.servers import Running, default_deployment

pytestmark = [pytest.mark.hosts, pytest.mark.triton, pytest.mark.alone]

PLACEMENT = {"first": "left", "second": "right"}
ASKED = {"text_input": "One host prefills, the other one decodes.", "max_tokens": 16}


def deployment(key_file: Path) -> Deployment:
    """The emulated engine: one prefill, one decode and the gateway, each in a separate server."""
    base = default_deployment("emulated")
    return msgspec.structs.replace(
        base,
        servers=(
            Spec(name="front"),
            Spec(name="first", gateway=False, prefill=("prefill_0",)),
            Spec(name="second", gateway=False, decode=("decode_0",)),
        ),
        transfer=msgspec.structs.replace(base.transfer, key_file=str(key_file)),
    )


@pytest.fixture(scope="module")
def network(hosts_possible: None) -> Iterator[Network]:
    with hosts(["left", "right"], rate_mbit=1000) as made:
        yield made


@pytest.fixture(scope="module")
def server(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hosts")
    with running_on(network, deployment(folder / "kv.key"), PLACEMENT, folder) as started:
        yield started


def test_each_server_is_on_its_host(network: Network, server: Running) -> None:
    for one in server.servers:
        host = PLACEMENT.get(one.spec.name)
        expected = namespace() if host is None else network.call(host, namespace)
        assert one.token is not None
        found = footprint.processes([one.token])
        assert len(found) > 1
        assert {namespace(process.pid) for process in found} == {expected}


def test_answers_as_one_host_does(
    server: Running, tmp_path: Path, emulated_server: Running
) -> None:
    answer = clients.generate(server, **ASKED)
    assert answer.stats["kv"]["transport"] == "nixl"
    assert answer.text == clients.generate(emulated_server, **ASKED).text


def test_status_asks_servers_of_other_hosts_at_their_ports(server: Running, tmp_path: Path) -> None:
    """The caller has started none of them."""
    here, *others = (Server(server.deployment, one, tmp_path) for one in server.deployment.servers)
    assert status(here)["state"] == "stopped", "a server of this host that was not started here"
    for other in others:
        found = status(other)
        assert (found["state"], found["pid"]) == ("ready", None)
        assert set(found["models"].values()) == {"READY"}
        assert found["values"]
    nobody = msgspec.structs.replace(others[0].spec, http_port=1, metrics_port=2)
    assert status(Server(server.deployment, nobody, tmp_path))["state"] == "unreachable"


def test_a_server_that_does_not_start_says_why(network: Network, tmp_path: Path) -> None:
    wanted = deployment(tmp_path / "kv.key")
    broken = msgspec.structs.replace(wanted.engine, profile=str(tmp_path / "none.yaml"))
    wanted = msgspec.structs.replace(wanted, engine=broken)
    with (
        pytest.raises(ServerError, match=r"emulated engine: .*none\.yaml: .*No such file"),
        running_on(network, wanted, PLACEMENT, tmp_path),
    ):
        pass


def namespace(process: int | str = "thread-self") -> Path:
    """Return the network namespace of a process."""
    return Path(f"/proc/{process}/ns/net").readlink()
