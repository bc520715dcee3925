"""Tests for a request's state machine, and for its statistics at the end."""

from __future__ import annotations

import itertools
import re

import pytest

from pdserve.scheduling import request as request_module
from pdserve.scheduling.request import FINAL, RECOVER_S, Request, State
from pdserve.transfer.reports import TransferReport

ALLOWED = {
    State.WAITING: {State.PREFILLING, State.DECODING, State.REJECTED},
    State.PREFILLING: {State.PREFILLED, State.WAITING, State.REJECTED},
    State.PREFILLED: {State.TRANSFERRING, State.FINISHED, State.WAITING},
    State.TRANSFERRING: {State.DECODING, State.WAITING},
    State.DECODING: {State.FINISHED, State.WAITING},
}


def request(state: State = State.WAITING) -> Request:
    made = Request(id="7", prompt=bytes(12), max_tokens=4)
    made.state = state
    return made


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_transitions(old: State, new: State) -> None:
    moved = request(old)
    allowed = ALLOWED.get(old, set())
    if old not in FINAL:
        allowed = allowed | {State.CANCELLED, State.EXPIRED, State.FAILED}
    if new in allowed:
        moved.to(new, 3.0)
        assert moved.state is new
        assert moved.history == [(3.0, new)]
    else:
        with pytest.raises(AssertionError, match=f"request 7: {old.name} -> {new.name}"):
            moved.to(new, 3.0)
        assert moved.state is old
        assert moved.history == []


def test_drawing_and_enum_are_of_the_same_states() -> None:
    drawn = set(re.findall(r"[A-Z]{4,}", request_module.__doc__ or "")) - {"TTFT"}
    assert drawn == {state.name for state in State}


def test_finish_keeps_the_reason() -> None:
    done = request(State.DECODING)
    done.output_tokens = 4
    done.finish("length", now=3.0)
    assert (done.state, done.finish_reason, done.output_tokens) == (State.FINISHED, "length", 4)
    with pytest.raises(AssertionError):
        done.finish("length", now=3.0)


def test_finish_after_a_stop_string() -> None:
    """Whatever the engine says, the answer ended where its reader found the stop string."""
    done = request(State.DECODING)
    done.output_tokens = 9
    done.end_answer(6)
    assert done.answer_ended
    done.finish("length", now=3.0)
    assert (done.finish_reason, done.output_tokens) == ("stop", 6)


def test_stats() -> None:
    done = request(State.DECODING)
    done.arrived, done.forwarded, done.first_token = 10.0, 10.001, 10.0205
    done.prefill, done.decode = "prefill_0", "decode_1"
    done.transfer = TransferReport(384, "nixl", "direct", 1.5, 1.25, 0.7504, token=7)
    done.prefill_ms, done.cached_tokens = 18.00049, 32
    done.attempts, done.output_tokens = 1, 4
    done.finish("stop", now=10.1)
    assert done.stats() == {
        "prompt_tokens": 3,
        "cached_tokens": 32,
        "output_tokens": 4,
        "attempts": 1,
        "scenario": "default",
        "group": "default",
        "prefill": "prefill_0",
        "decode": "decode_1",
        "ms": {
            "forward": 1.0,
            "prefill": 18.0,
            "transfer": 1.5,
            "exposed": 1.25,
            "ttft": 20.5,
            "e2e": 100.0,
        },
        "kv": {"bytes": 384, "transport": "nixl", "strategy": "direct", "expected_ms": 0.75},
    }


def test_stats_without_a_decode() -> None:
    done = request(State.PREFILLED)
    done.finish("stop", now=1.0)
    assert done.stats()["decode"] == ""
    assert done.stats()["kv"] == {"bytes": 0, "transport": "", "strategy": "", "expected_ms": 0.0}


def test_once_more_keeps_the_limit_for_a_first_token() -> None:
    again = request(State.PREFILLING)
    again.arrived = again.waiting_since = 10.0
    again.again(now=14.0)
    assert (again.state, again.deadline) == (State.WAITING, 10.0 + again.ttft_limit_s)
    assert again.so_far == again.prompt


def test_once_more_in_mid_answer() -> None:
    """It continues from the tokens so far; the next token has a limit of its own."""
    again = request(State.DECODING)
    again.arrived = again.waiting_since = 10.0
    assert again.add(b"\5\0\0\0\7\0\0\0") == [5, 7]
    again.again(now=500.0)
    assert (again.state, again.deadline) == (State.WAITING, 500.0 + RECOVER_S)
    assert again.so_far == again.prompt + b"\5\0\0\0\7\0\0\0"


def test_own_time_limit_bounds_every_other() -> None:
    limited = Request(id="7", prompt=bytes(12), max_tokens=4, time_limit_s=20.0)
    limited.arrived = limited.waiting_since = 10.0
    assert limited.deadline == limited.ends_by == 30.0
    limited.add(bytes(4))
    limited.state = State.DECODING
    limited.again(now=15.0)
    assert limited.deadline == 30.0
