"""Tests for ending the processes of models that Triton has given up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pdctl import footprint, loading, log
from pdctl.loading import GivenUp
from pdserve.node import heartbeat

# As a model does, it reports that it has loaded, if it has, and waits for work.
MODEL = """
import sys
from pathlib import Path
from pdserve.node.heartbeat import Heartbeat
beats = Heartbeat(Path(sys.argv[1]), threads=1)
if sys.argv[2] == "loaded":
    beats.loaded()
print("there", flush=True)
sys.stdin.read()
"""
Starts = Callable[[str, str], subprocess.Popen[bytes]]


@pytest.fixture
def token() -> Iterator[str]:
    token = footprint.new_token("local")
    yield token
    footprint.erase([token], grace_s=0)


@pytest.fixture
def start(token: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    monkeypatch.setattr(loading, "GIVEN_UP_S", 0.0)
    with ExitStack() as stack:

        def start(state: str, mark: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-c", MODEL, str(heartbeat.path(token, "prefill_0")), state],
                env={footprint.VARIABLE: mark},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            return process

        yield start


def test_one_that_has_loaded_for_long(token: str, start: Starts) -> None:
    process = start("loaded", token)
    given_up = GivenUp(token)
    assert given_up.end(["decode_0"]) == []
    assert given_up.end(["prefill_0"]) == ["prefill_0"]
    assert process.wait(5) == -9


def test_one_that_has_just_loaded_is_left_alone(
    token: str, start: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "GIVEN_UP_S", 5.0)
    process = start("loaded", token)
    given_up = GivenUp(token)
    assert given_up.end(["prefill_0"]) == given_up.end(["prefill_0"]) == []
    assert process.poll() is None


def test_one_that_loads_is_left_alone(token: str, start: Starts) -> None:
    process = start("loading", token)
    assert GivenUp(token).end(["prefill_0"]) == []
    assert process.poll() is None


def test_a_process_of_another_server_is_left_alone(token: str, start: Starts) -> None:
    """A process id may have belonged to a model of the server's previous start."""
    process = start("loaded", footprint.new_token("local"))
    assert GivenUp(token).end(["prefill_0"]) == []
    assert process.poll() is None


@pytest.mark.parametrize(
    "line",
    [
        "error: Internal: Stub process 'prefill_0_0_0' is not healthy.",
        "Internal: Failed to obtain the health mutex.",
        "terminate called after throwing an instance of 'boost::interprocess::lock_exception'",
    ],
)
def test_what_a_starved_server_says(line: str) -> None:
    assert log.starved(f"I1 hello\n{line}\n")
    assert not log.starved("I1 hello\nInternal: no weights\n")
    said = "DeploymentError: /m: rotary embedding of type dynamic is not served"
    for refused in (
        f'pb_stub.cc:366] "Failed to initialize Python stub: {said}\\n\\nAt:',
        f"lifecycle.cc:642] \"failed to load 'prefill_0' version 1: Internal: {said}\\n\\nAt:",
    ):
        text = f"I1 hello\n{line}\nE1122 15:37:06.4 5618 {refused}\n"
        assert not log.starved(text), "the next start would fail, too"
