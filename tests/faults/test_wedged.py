"""Tests for models that are alive but useless: an engine that hangs, a BLS child that is wedged."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from pdctl import fleet
from pdserve.config import Gateway, Prefill
from tests.clients import Refused, generate, generate_stream, wait_until
from tests.faults.serving import (
    RESTARTED_S,
    all_in_one,
    on_this_machine,
    said,
    serves,
    stub,
    watched,
)
from tests.servers import emulated_deployment, running

pytestmark = [pytest.mark.triton, pytest.mark.full]


def test_an_engine_that_does_not_come_to_an_end(tmp_path: Path) -> None:
    """It answers every message; only a probe finds that it computes nothing."""
    deployment = emulated_deployment(
        tmp_path,
        {"prefill": {"base_ms": 3_600_000}},
        prefill=Prefill(arena_mib=16),
        gateway=Gateway(stall_s=1.0),
    )
    with running(deployment, tmp_path) as server:
        one = server.servers[0]
        before = stub(one, "prefill_0")
        fleet.watch(server.servers)
        wait_until(lambda: "prefill_0 is repaired" in said(one), 30)
        assert "prefill_0 has failed: no answer within 1 s, 2 times in a row" in said(one)
        assert stub(one, "prefill_0") != before
        assert "decode_0" not in said(one)


def test_a_caller_that_dies_in_mid_stream(tmp_path: Path) -> None:
    """Over BLS, its child would hang at every later request, and still be reported ready."""
    base = all_in_one(tmp_path)
    gateway = msgspec.structs.replace(base.gateway, channel="bls")
    with watched(msgspec.structs.replace(base, gateway=gateway), tmp_path) as server:

        def ask(number: int) -> None:
            with suppress(OSError, Refused, ValueError):
                for _ in generate_stream(server, text_input=f"{number}", max_tokens=400):
                    pass

        threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        stub(server.servers[0], "pdserve").kill()
        killed = time.monotonic()
        for thread in threads:
            thread.join(2)
            assert not thread.is_alive(), "its clients get an error"

        def back() -> bool:
            with suppress(OSError, Refused):
                return serves(server)
            return False

        wait_until(back, on_this_machine(RESTARTED_S))
        assert time.monotonic() - killed < on_this_machine(RESTARTED_S)
        for number in range(8):
            assert generate(server, text_input=f"{number}", max_tokens=4).finish_reason
