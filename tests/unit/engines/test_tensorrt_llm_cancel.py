"""Tests that requests are given up without blocks being lost, in each version of the fake.

The fake loses the context's blocks if a request is aborted while its KV cache moves, or is about
to, as the library does.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve import config, errors
from tests.unit.engines.llm import (
    VERSIONS,
    answer,
    deployment,
    engine,
    new_request,
)
from tests.unit.inprocess import real, until

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from pdserve.engines.tensorrt_llm.engine import TensorRTLLM

LEASE_S = 1.0
# Longer than a test takes on a busy machine.
LONG_S = 60.0


class Pair:
    """A prefill and a decode; closed by ``async with``."""

    def __init__(self, folder: Path, lease_s: float = LEASE_S) -> None:
        limits = config.Prefill(slots=4, lease_s=lease_s)
        wanted = msgspec.structs.replace(deployment(folder), prefill=limits)
        self.prefill, self.decode = engine("prefill", wanted), engine("decode", wanted)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.prefill.close()
        await self.decode.close()


def faults(folder: Path, patch: pytest.MonkeyPatch, *wanted: dict[str, Any]) -> None:
    path = folder / "faults.json"
    path.write_text(json.dumps(wanted))
    patch.setenv("FAKE_TENSORRT_LLM_FAULTS", str(path))


def inside(one: TensorRTLLM) -> Any:
    return one._llm._engine


@real
async def test_a_context_that_is_cancelled_as_it_is_computed(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be sent already, though its caller has not seen its token yet."""
    faults(tmp_path, monkeypatch, {"at": "context", "nth": 1, "do": "stall", "seconds": 0.1})
    async with Pair(tmp_path, LONG_S) as pair:
        task = asyncio.create_task(pair.prefill.context(new_request(1), keep=True))
        await asyncio.sleep(0)
        while not inside(pair.prefill).held:
            time.sleep(0.001)  # noqa: ASYNC251 - the adapter must not see the answer yet
        task.cancel()
        context = await task
        # Nothing is lost: a decode can still take it.
        assert len(await answer(pair.decode, new_request(), context.token, context.link)) == 7
        await until(lambda: not inside(pair.prefill).used_blocks)


@pytest.mark.parametrize("version", VERSIONS[1:], indirect=True)
@real
async def test_a_context_that_was_cancelled_is_freed_after_the_lease(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults(tmp_path, monkeypatch, {"at": "context", "nth": 1, "do": "stall", "seconds": 0.1})
    async with Pair(tmp_path) as pair:
        task = asyncio.create_task(pair.prefill.context(new_request(1), keep=True))
        await asyncio.sleep(0)
        while not inside(pair.prefill).held:
            time.sleep(0.001)  # noqa: ASYNC251 - the adapter must not see the answer yet
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(LEASE_S + 0.2)
        # Version 1.2 frees it when the next context request comes, not before.
        other = await pair.prefill.context(new_request(1), keep=True)
        await answer(pair.decode, new_request(), other.token, other.link)
        await until(lambda: not inside(pair.prefill).used_blocks)


@real
async def test_a_generation_that_is_cancelled_while_its_kv_cache_moves(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults(tmp_path, monkeypatch, {"at": "pull", "do": "stall", "seconds": 0.3})
    async with Pair(tmp_path, LONG_S) as pair:
        context = await pair.prefill.context(new_request(1), keep=True)
        request = new_request(400)
        task = asyncio.create_task(answer(pair.decode, request, context.token, context.link))
        await until(lambda: inside(pair.decode).used_blocks > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not inside(pair.prefill).used_blocks)
        await until(lambda: not inside(pair.decode).used_blocks)


@real
async def test_a_generation_that_is_cancelled_after_its_first_piece_ends_at_once(
    tmp_path: Path, version: str
) -> None:
    (tmp_path / "profile.yaml").write_text("{speed: 1, decode: {base_ms: 5}}")
    async with Pair(tmp_path, LONG_S) as pair:
        context = await pair.prefill.context(new_request(1), keep=True)
        pieces = pair.decode.generate(new_request(4000), context.token, context.link)
        await anext(pieces)
        began = time.monotonic()
        await pieces.aclose()
        assert time.monotonic() - began < LONG_S / 4
        await until(lambda: not inside(pair.decode).used_blocks)


@real
async def test_a_transfer_that_stalls_is_waited_for_no_longer_than_its_deadline(
    tmp_path: Path,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults(tmp_path, monkeypatch, {"at": "transfer", "do": "stall", "seconds": 30})
    async with Pair(tmp_path) as pair:
        context = await pair.prefill.context(new_request(1), keep=True)
        task = asyncio.create_task(answer(pair.decode, new_request(), context.token, context.link))
        await until(lambda: inside(pair.decode).used_blocks > 0)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert LEASE_S - 0.1 < time.monotonic() - began < LEASE_S + 1
        assert "may have lost blocks" in caplog.text


@real
async def test_a_request_that_is_cancelled_twice_ends_at_once(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults(
        tmp_path,
        monkeypatch,
        {"at": "context", "do": "stall", "seconds": 30},
        {"at": "transfer", "do": "stall", "seconds": 30},
    )
    async with Pair(tmp_path, LONG_S) as pair:
        task = asyncio.create_task(pair.prefill.context(new_request(1), keep=True))
        await until(lambda: inside(pair.prefill).used_blocks > 0)
        began = time.monotonic()
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
        assert task.cancelled()
        assert time.monotonic() - began < LONG_S / 4


@pytest.mark.parametrize("version", VERSIONS[1:], indirect=True)
@real
async def test_a_transfer_that_takes_too_long_is_an_error_of_the_request(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults(tmp_path, monkeypatch, {"at": "pull", "do": "stall", "seconds": 2})
    async with Pair(tmp_path) as pair:
        context = await pair.prefill.context(new_request(1), keep=True)
        with pytest.raises(errors.InstanceError, match=r"generation: RequestError.*within 1"):
            await answer(pair.decode, new_request(), context.token, context.link)
