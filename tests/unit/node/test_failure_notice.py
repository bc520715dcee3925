"""Tests that only the deployment's watchdogs can report an instance lost, and only one epoch."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from pdserve.errors import InstanceError, InvalidRequest
from pdserve.kvcache.handle import EPOCH_BYTES
from pdserve.node import epoch
from pdserve.node.failure_notice import FailureNotice, decode, encode
from pdserve.rpc import messages
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import Calls
from pdserve.rpc.messages import Accepted, Released
from tests.unit.inprocess import virtual

KEY, OLD, NEW = b"k" * 32, b"former..", b"present."


def test_what_is_told_is_heard_whatever_the_clocks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    text = encode(FailureNotice("decode_0", OLD), KEY)
    for offset in (0.0, -3600.0, 3600.0, -1e9):
        monkeypatch.setattr(time, "time", lambda offset=offset: 1e9 + offset)
        assert decode(text, KEY) == FailureNotice("decode_0", OLD)


@pytest.mark.parametrize(
    "text",
    [
        "decode_0",
        "",
        "not base64!",
        "ü",
        encode(FailureNotice("decode_0", OLD), b"another key, as long as 32 bytes"),
        encode(FailureNotice("decode_0", OLD), KEY)[:-8],
        encode(FailureNotice("decode_0", b"short"), KEY),
    ],
)
def test_what_anybody_could_say_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="failure_notice: only a watchdog of this deployment"):
        decode(text, KEY)


class TestEpoch:
    def test_it_is_seen_from_outside_as_from_inside(self) -> None:
        script = (
            "import os; from pdserve.node import epoch\n"
            "print(epoch.of(os.getpid()).hex(), flush=True); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            assert said == epoch.of(process.pid).hex()
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert said == epoch.of(process.pid).hex(), "of a zombie, too"
        assert len(bytes.fromhex(said)) == EPOCH_BYTES
        with pytest.raises(OSError, match=str(process.pid)):
            epoch.of(process.pid)

    def test_every_process_has_one_of_its_own(self) -> None:
        processes = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
        try:
            assert len({epoch.of(one.pid) for one in processes} | {epoch.of(os.getpid())}) == 4
        finally:
            for one in processes:
                one.kill()
                one.wait()


def deliver_reply(calls: Calls, call: str, by: bytes, reply: messages.Reply | None = None) -> None:
    calls.deliver(call, messages.encode_replies([(call, reply or Accepted())], by))


class TestCalls:
    def test_the_life_that_has_spoken_last_is_lost_once(self) -> None:
        calls = Calls()
        calls.open("1")
        assert not calls.lost(OLD), "no epoch is known yet"
        deliver_reply(calls, "1", OLD)
        assert not calls.lost(NEW)
        assert not calls.lost(b"")
        assert calls.lost(OLD)
        assert not calls.lost(OLD), "a repeated notice has no effect"

    def test_of_a_former_life_nothing_is_lost(self) -> None:
        calls = Calls()
        calls.open("1")
        deliver_reply(calls, "1", OLD)
        deliver_reply(calls, "1", NEW)
        assert not calls.lost(OLD)
        assert calls.lost(NEW)

    @virtual
    async def test_a_new_life_ends_what_the_former_one_had_begun(self) -> None:
        """They end even if no notice of the former process's end has come."""
        calls = Calls()
        begun, waiting = calls.open("begun"), calls.open("waiting")
        deliver_reply(calls, "begun", OLD)
        deliver_reply(calls, "waiting", NEW, Released())
        assert await begun.get(1) == Accepted()
        with pytest.raises(InstanceError, match="its process is gone"):
            await begun.get(1)
        assert await waiting.get(1) == Released(), "it may have reached the new process"

    @virtual
    async def test_what_a_dead_one_had_sent_does_not_bring_it_back(self) -> None:
        calls = Calls()
        calls.open("1")
        deliver_reply(calls, "1", OLD)
        assert calls.lost(OLD)
        late = calls.open("1")
        deliver_reply(calls, "1", OLD)
        with pytest.raises(InstanceError, match="no answer"):
            await late.get(1)
        assert not calls.lost(OLD)

    @virtual
    async def test_what_does_not_name_its_life_is_heard(self) -> None:
        calls = Calls()
        replies = calls.open("1")
        deliver_reply(calls, "1", OLD)
        deliver_reply(calls, "1", b"", Released())
        assert [await replies.get(1), await replies.get(1)] == [Accepted(), Released()]


def test_a_channel_goes_on_when_another_life_is_said_to_be_lost() -> None:
    async def scenario() -> None:
        channel = GrpcChannel("127.0.0.1:1", "decode_0", KEY)
        replies = channel.open("1", messages.Release("1"))
        deliver_reply(channel._calls, "1", NEW)
        channel.lose(OLD)
        assert await replies.get(1) == Accepted()
        channel.lose(NEW)
        with pytest.raises(InstanceError, match="its process is gone"):
            await replies.get(1)
        await channel.close()

    asyncio.run(scenario())
