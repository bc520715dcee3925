"""Tests for server addresses: which ones Triton can listen at, and which ones others can reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl import ports
from pdctl.errors import PortTaken, ServerError
from pdserve import config
from pdserve.config import Server, addresses
from pdserve.errors import DeploymentError


def load(tmp_path: Path, *servers: str, rest: str = "") -> config.Deployment:
    file = tmp_path / "deployment.yaml"
    file.write_text("model: m\nservers:\n" + "".join(f"- {{{one}}}\n" for one in servers) + rest)
    return config.load(file)


PAIR = "name: a, prefill: [p], decode: [d]"
OTHER = "name: b, http_port: 9000, grpc_port: 9001, metrics_port: 9002"


def test_localhost_is_the_address_that_it_means(tmp_path: Path) -> None:
    (server,) = load(tmp_path, f"{PAIR}, host: localhost").servers
    assert server.host == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "10.0.0.1"])
def test_addresses_stay(tmp_path: Path, host: str) -> None:
    assert load(tmp_path, f"{PAIR}, host: {host}").servers[0].host == host


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("node-1", "'node-1' is no address; an IPv4 address in full is allowed"),
        ("localhost.", "is no address"),
        ("127.1", "'127.1' is no address"),
        ("127.0.0.01", "is no address"),
        ("2130706433", "is no address"),
        ("''", "'' is no address"),
        ("'127.0.0.1:8000'", "is no address"),
        ("'127.0.0.1 '", "is no address"),
        ("256.0.0.1", "is no address"),
        ("'::1'", "::1 is an IPv6 address"),
        ("'::ffff:127.0.0.1'", "is an IPv6 address"),
        ("255.255.255.255", "is no address of a host"),
        ("224.0.0.1", "is no address of a host"),
    ],
)
def test_what_triton_cannot_listen_at_is_refused(tmp_path: Path, host: str, reason: str) -> None:
    with pytest.raises(DeploymentError, match=rf"{reason}.* - at `\$\.servers\[0\]`, line 3"):
        load(tmp_path, f"{PAIR}, host: {host}")


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        ((f"{PAIR}, http_port: 8001",), r"address 127\.0\.0\.1:8001 is used more than once, by a$"),
        ((PAIR, "name: b, http_port: 9000"), r"127\.0\.0\.1:8001 is used .*, by a and b"),
        ((f"{PAIR}, host: localhost", "name: b"), r"127\.0\.0\.1:8000 is used more than once"),
        ((f"{PAIR}, host: 0.0.0.0", "name: b"), r"127\.0\.0\.1:8000 is used more than once"),
        ((PAIR, "name: b, host: 0.0.0.0"), r"0\.0\.0\.0:8000 is used more than once"),
        (
            (f"{PAIR}, host: 0.0.0.0", f"{OTHER}, host: 10.0.0.2"),
            r"server a: host 0\.0\.0\.0 is no address under which b \(10\.0\.0\.2\) could reach it",
        ),
    ],
)
def test_addresses_that_do_not_go_together(
    tmp_path: Path, servers: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(DeploymentError, match=reason):
        load(tmp_path, *servers)


def test_the_same_port_of_two_hosts(tmp_path: Path) -> None:
    found = load(tmp_path, f"{PAIR}, host: 10.0.0.1", "name: b, host: 10.0.0.2")
    assert found.transports == ("shm", "nixl")
    near = load(tmp_path, PAIR, "name: b, host: 127.0.0.2")
    assert near.transports == ("shm",), "loopback is one machine"


def test_the_port_of_a_model_elsewhere(tmp_path: Path) -> None:
    models = "engine: {kind: tensorrtllm_backend, models: {p: {address: 'h:70000', model: m}}}\n"
    with pytest.raises(DeploymentError, match="port 70000 of h:70000 is not allowed; allowed: 1"):
        load(tmp_path, PAIR, rest=models)


def test_every_address_of_this_machine_is_of_one_machine() -> None:
    assert {addresses.machine(host) for host in ("127.0.0.1", "127.9.9.9", addresses.EVERY)} == {
        addresses.HERE
    }
    assert "127.0.0.1" in ports.own_addresses()


def test_another_machines_server_is_not_a_taken_port() -> None:
    with pytest.raises(ServerError, match=r"192\.0\.2\.1 is an address of another machine") as told:
        ports.check(Server(name="far", host="192.0.2.1"))
    assert not isinstance(told.value, PortTaken)
    assert "--server" in str(told.value)
    assert "another port" not in str(told.value)
