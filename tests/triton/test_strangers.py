"""Tests that instances answer only their own deployment, though anyone can reach the port."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdctl import fleet
from pdctl.server import Server
from pdserve.config import Deployment, Gateway
from pdserve.config import Server as Spec
from pdserve.control.assignment import FIRST
from pdserve.rpc import messages
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.messages import Describe, Described, Failed, PrefillRequest, Release, Released
from pdserve.rpc.seal import MAC_BYTES, NUMBER_BYTES, Seal, Unsealed
from pdserve.sampling import Sampling
from pdserve.transfer import key
from tests.clients import Refused, generate, metrics
from tests.servers import START_TIMEOUT_S, default_deployment, on_free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pdserve.rpc.messages import Reply
    from tests.servers import Running

pytestmark = pytest.mark.triton

WITHIN_S = 10.0
REFUSED = Failed(Unsealed.code, str(Unsealed()))
PROMPT = PrefillRequest("stranger", b"\1\0\0\0", Sampling(), "", 1000.0)


def secret(deployment: Deployment) -> bytes:
    return key.load(Path(deployment.transfer.key_file))


def first_replies(server: Running, model: str, *payloads: bytes) -> list[Reply]:
    """Return an instance's first reply to each message."""

    async def run() -> list[Reply]:
        channel = GrpcChannel(server.grpc, model, secret(server.deployment))
        calls = [channel.send(f"{n}", payload) for n, payload in enumerate(payloads)]
        try:
            return [await replies.get(WITHIN_S) for replies in calls]
        finally:
            await channel.close()

    return asyncio.run(run())


def refusals(server: Running, model: str) -> float:
    return sum(
        sample.value
        for sample in metrics(server)
        if sample.name == "pdserve_unsealed_messages_total" and sample.labels["instance"] == model
    )


# No other test sends unsealed messages to these, so the log lines are of this test.
@pytest.mark.parametrize("model", ["prefill_1", "decode_1"])
def test_a_stranger_is_told_nothing(emulated_server: Running, model: str) -> None:
    own = Seal(secret(emulated_server.deployment), model)
    message = messages.encode(PROMPT)
    sealed = own.close(message, FIRST)
    strange = [
        b"",
        b"\xff" * 9,
        b"\x81\xa4type\xa6decode",
        bytes(100_000),
        bytes(8 << 20),
        message,
        messages.encode(Describe("stranger")),
        sealed[:-1],
        *(
            sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
            for at in (0, MAC_BYTES, MAC_BYTES + NUMBER_BYTES)
        ),
        Seal(secret(emulated_server.deployment), "prefill_0").close(message, FIRST),
        Seal(secrets.token_bytes(32), model).close(message, FIRST),
    ]
    before, logged = refusals(emulated_server, model), len(emulated_server.servers[0].read_log())
    assert first_replies(emulated_server, model, *strange) == [REFUSED] * len(strange)
    assert first_replies(
        emulated_server, model, own.close(messages.encode(Release("it")), FIRST)
    ) == [Released()]
    for _ in range(100):
        if refusals(emulated_server, model) == before + len(strange):
            break
        asyncio.run(asyncio.sleep(0.05))
    assert refusals(emulated_server, model) == before + len(strange)
    lines = [
        line
        for line in emulated_server.servers[0].read_log()[logged:].splitlines()
        if f"{model}: " in line and "not sealed" in line
    ]
    assert len(lines) == 1, "one line for all of them"
    assert "key_file" in lines[0]


def test_a_message_to_one_prefill_is_none_to_another(emulated_server: Running) -> None:
    own = Seal(secret(emulated_server.deployment), "prefill_1")
    describe = own.close(messages.encode(Describe("it")), FIRST)
    assert first_replies(emulated_server, "prefill_0", describe) == [REFUSED]
    [described] = first_replies(emulated_server, "prefill_1", describe)
    assert isinstance(described, Described)


@pytest.fixture
def two_keys(tmp_path: Path) -> Iterator[list[Server]]:
    """A gateway and its worker, whose key files differ."""
    whole = on_free_ports(
        msgspec.structs.replace(
            default_deployment("emulated"),
            servers=(
                Spec(name="front"),
                Spec(name="worker", gateway=False, prefill=("prefill_0",), decode=("decode_0",)),
            ),
            gateway=Gateway(ttft_limit_ms=5000),
        )
    )
    servers = []
    for spec in whole.servers:
        file = tmp_path / f"{spec.name}.key"
        file.write_bytes(secrets.token_bytes(32))
        file.chmod(0o600)
        own = msgspec.structs.replace(
            whole, transfer=msgspec.structs.replace(whole.transfer, key_file=str(file))
        )
        servers.append(Server(own, spec, tmp_path / "run"))
    fleet.start(servers, held=True, timeout_s=START_TIMEOUT_S, progress=lambda *_: None)
    yield servers
    fleet.stop(servers)


def test_hosts_with_different_keys_say_so(two_keys: list[Server]) -> None:
    front, worker = two_keys
    address = _Address(front.http)
    with pytest.raises(Refused, match=r"not sealed with .*transfer\.key_file") as refused:
        generate(address, text_input="Who is there?", max_tokens=4)  # type: ignore[arg-type]
    assert refused.value.status in (400, 500)
    log = worker.read_log()
    assert "prefill_0: " in log
    assert "transfer.key_file is another" in log


class _Address:
    def __init__(self, http: str) -> None:
        self.http = http
