"""Tests for the environment variables that a deployment's network becomes."""

from __future__ import annotations

import pytest

from pdctl import network
from pdserve.config import Deployment, Engine, Network, Server, Transfer


def deployment(*hosts: str, **transfer: object) -> Deployment:
    servers = tuple(Server(f"s{number}", host) for number, host in enumerate(hosts))
    return Deployment("m", servers, transfer=Transfer(**transfer))  # type: ignore[arg-type]


@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("127.0.0.1", "127.0.0.2"), ("localhost",)])
def test_ucx_uses_loopback_where_all_hosts_are(hosts: tuple[str, ...]) -> None:
    found = network.variables(deployment(*hosts, transports=("nixl",)), {})

    assert found == {"UCX_NET_DEVICES": "lo"}


@pytest.mark.parametrize("hosts", [("0.0.0.0",), ("10.0.0.1",), ("127.0.0.1", "10.0.0.1")])
def test_ucx_finds_out_where_a_host_is_not(hosts: tuple[str, ...]) -> None:
    assert network.variables(deployment(*hosts, transports=("nixl",)), {}) == {}


def test_what_somebody_has_chosen_stays() -> None:
    wanted = Network(devices=("eth0",))

    told = network.variables(deployment("127.0.0.1", transports=("nixl",), network=wanted), {})
    set_before = {"UCX_NET_DEVICES": "eth1"}

    assert told == {"UCX_NET_DEVICES": "eth0"}
    assert network.variables(deployment("127.0.0.1", transports=("nixl",)), set_before) == {}


def test_engines_that_move_kv_caches_themselves_use_ucx_too() -> None:
    external = Deployment("m", (Server("s"),), engine=Engine(kind="tensorrt_llm"))

    assert network.variables(external, {}) == {"UCX_NET_DEVICES": "lo"}


def test_a_deployment_without_ucx_says_nothing_of_it() -> None:
    assert network.variables(deployment("127.0.0.1"), {}) == {}
