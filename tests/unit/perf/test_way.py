"""Tests for `perf.way`, which traces a prompt and a KV cache through the code."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from itertools import pairwise

import msgspec
import pytest
from perf.way.__main__ import table, ways
from perf.way.calls import Call, Recorder, Way, way

from pdctl.paths import ROOT
from pdserve.kvcache import layout
from pdserve.observability.metrics import Registry
from pdserve.rpc.client import Replies
from pdserve.rpc.messages import Accepted


@pytest.fixture(scope="module")
def traced() -> tuple[Way, Way]:
    return asyncio.run(ways())


def packages(of: Way) -> list[str]:
    return [stretch.package for stretch in of.stretches]


def test_counts_fit_together(traced: tuple[Way, Way]) -> None:
    for one in traced:
        counts = [stretch.calls for stretch in one.stretches]
        assert one.calls == sum(sum(calls.values()) for calls in counts) >= one.modules
        assert one.modules == len({module for calls in counts for module in calls})
        assert one.crossings == len(counts) - 1
        assert one.returns == one.crossings + 1 - len(set(packages(one)))
        assert all(a != b for a, b in pairwise(packages(one)))


def test_a_prompt_goes_from_the_gateway_to_a_prefill_and_back(traced: tuple[Way, Way]) -> None:
    found = packages(traced[0])
    assert found[0] == "gateway"
    assert found[-1] == "scheduling", "it yields the first token"
    for a, b in (("scheduling", "rpc"), ("rpc", "instances"), ("rpc", "scheduling")):
        assert (a, b) in pairwise(found)
    assert "engines" in found


def test_a_handle_goes_from_a_prefill_over_the_gateway_into_a_pool(traced: tuple[Way, Way]) -> None:
    found = traced[1].stretches
    assert found[0].package == "instances"
    assert "instances.prefill" in found[0].calls
    assert found[-1].package == "transfer", "it has moved the rows"
    assert "transfer.consumer.strategies" in found[-1].calls
    asked = packages(traced[1])
    assert asked.index("rpc") < asked.index("scheduling")
    assert any("instances.decode" in stretch.calls for stretch in found)
    assert "gateway" not in asked


def test_a_step_back_is_a_return() -> None:
    calls = [Call(f"{module}.m", "f") for module in ("a", "a", "b", "a", "c", "b")]
    found = way("some", [*calls, Call("errors", "f"), Call("b.other", "g")])
    assert packages(found) == ["a", "b", "a", "c", "b", "errors", "b"]
    assert (found.modules, found.calls, found.crossings, found.returns) == (5, 8, 6, 3)
    assert found.stretches[0].calls == {"a.m": 2}
    assert table(found).splitlines()[1].split() == ["a", "m", "2"]


def test_a_coroutine_counts_once_however_often_it_goes_on() -> None:
    async def wait() -> list[Call]:
        replies = Replies()
        asyncio.get_running_loop().call_later(0.01, replies.put, Accepted())
        with recorder.recording() as calls:
            await replies.get(5.0)
        return calls

    with Recorder() as recorder:
        calls = asyncio.run(wait())
    assert [call.function for call in calls] == ["get", "put", "_wake"]


def test_calls_in_other_threads_count() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()
        Registry()

    with Recorder() as recorder:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        begun.wait()
        layout.KVLayout(1, 1, 2, "float32").shape(3)
        with recorder.recording() as calls:
            go_on.set()
            thread.join()
    assert calls == [Call("observability.metrics", "__init__")]


def test_the_command_prints_text_or_json() -> None:
    command = [sys.executable, "-m", "perf.way"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.startswith("a prompt to its first token: ")
    made = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, check=True).stdout
    assert [one.name for one in msgspec.json.decode(made, type=tuple[Way, Way])] == [
        block.partition(":")[0] for block in text.split("\n\n")
    ]
