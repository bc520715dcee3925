"""Tests for the sockets that a server's processes listen on, by transport and channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from pdctl import footprint
from pdserve.config import Gateway
from tests.clients import generate, wait_linked
from tests.servers import Running, emulated_deployment, running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.triton

ARGUMENTS = ("transport", "channel")
CASES = [
    pytest.param("shm", "grpc", marks=pytest.mark.full),
    pytest.param("shm", "bls", marks=pytest.mark.full),
    pytest.param("nixl", "grpc"),
    pytest.param("nixl", "bls", marks=pytest.mark.full),
]


@pytest.mark.parametrize(ARGUMENTS, CASES)
def test_what_listens_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str, channel: str
) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    deployment = emulated_deployment(tmp_path, {}, gateway=Gateway(channel=channel))
    transfer = msgspec.structs.replace(deployment.transfer, transports=(transport,))
    deployment = msgspec.structs.replace(deployment, transfer=transfer)

    with running(deployment, tmp_path) as server:
        wait_linked(server)
        answer = generate(server, text_input="The sky is", max_tokens=2, ignore_eos=True)
        found = listening(server)
        (spec,) = server.deployment.servers

    assert answer.stats["kv"]["transport"] == transport
    ports = {port for name, _, port in found if name == "tritonserver"}
    assert ports == set(spec.ports)
    assert {host for _, host, _ in found} == {"127.0.0.1"}
    stubs = {name for name, _, _ in found} - {"tritonserver"}
    assert stubs == ({"prefill_0", "decode_0"} if transport == "nixl" else set())


def listening(server: Running) -> set[tuple[str, str, int]]:
    """Return process (``tritonserver`` or a stub's model), address and port of each socket.

    These are the TCP sockets that listen, and the UDP sockets, which anyone can send to.
    """
    found = set()
    for process in footprint.processes([one.token for one in server.servers if one.token]):
        for one in process.net_connections("inet"):
            if one.status == psutil.CONN_LISTEN or (one.status == psutil.CONN_NONE and one.laddr):
                host, port = one.laddr
                found.add((name(process), host.removeprefix("::ffff:"), port))
    return found


def name(process: psutil.Process) -> str:
    path = next((word for word in process.cmdline() if word.endswith("/model.py")), None)
    return path.split("/")[-3] if path else process.name()
