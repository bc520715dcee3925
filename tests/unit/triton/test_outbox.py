"""Tests for responses that Triton refuses to send.

``triton_python_backend_utils`` exists only in Triton's stubs. The part of it that the outbox uses
is imitated here; every test that starts the server uses the real one.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pdserve.node.heartbeat import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Iterator

FINAL = 1


class Sender:
    """Accepts responses, except those that are ``refused``."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []
        self.cancelled = False
        self.over = threading.Event()

    def send(self, response: Any = None, flags: int = 0) -> None:
        if response == "refused":
            raise RuntimeError("no room in the shared memory")
        self.sent.append((response, flags))
        if flags:
            self.over.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Logger:
    errors: list[str] = []  # noqa: RUF012 - as the stub's own, which has no instances

    @classmethod
    def log_error(cls, line: str) -> None:
        cls.errors.append(line)


class TritonError(Exception):
    INTERNAL = 13


def refusal(error: TritonError) -> str:
    """Return a stand-in for a response that is an error."""
    return str(error)


LOST = str(TritonError("INTERNAL: a part of the answer is lost", TritonError.INTERNAL))


@pytest.fixture
def outbox_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    stub = ModuleType("triton_python_backend_utils")
    stub.Logger = Logger  # type: ignore[attr-defined]
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    stub.TritonError = TritonError  # type: ignore[attr-defined]
    stub.InferenceResponse = refusal  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    yield importlib.import_module("pdserve.triton.outbox")
    for name in ("outbox", "backend"):
        delattr(sys.modules["pdserve.triton"], name)
        del sys.modules[f"pdserve.triton.{name}"]


def test_a_request_ends_whose_response_is_refused(outbox_module: ModuleType) -> None:
    """Otherwise its client would take an incomplete answer for a whole one."""
    gone: list[str] = []
    told = threading.Event()

    def end(key: str) -> None:
        gone.append(key)
        outbox.send(key, "the end", last=True)
        told.set()

    outbox = outbox_module.Outbox(0.01, end, Heartbeat(None, 1), 0)
    one, other = Sender(), Sender()
    outbox.open("1", one)
    outbox.open("2", other)
    for response in ("a", "refused", "refused", "b"):
        outbox.send("1", response, last=False)
        outbox.send("2", "c", last=False)
    one.cancelled = True  # which is not logged again
    assert told.wait(10)
    outbox.send("2", None, last=True)
    assert other.over.wait(10)
    assert one.over.wait(10)
    outbox.close()

    assert gone == ["1"]
    assert one.sent == [("a", 0), ("b", 0), (LOST, FINAL)], "whatever its end was to be"
    assert other.sent == [("c", 0)] * 4 + [(None, FINAL)]
    assert (
        Logger.errors
        == ["a response could not be sent: RuntimeError: no room in the shared memory"] * 2
    )


def test_work_that_follows_responses_waits_until_triton_has_them(
    outbox_module: ModuleType,
) -> None:
    taken, done = threading.Event(), threading.Event()

    class SlowSender(Sender):
        def send(self, response: Any = None, flags: int = 0) -> None:
            assert taken.wait(10)
            super().send(response, flags)

    outbox = outbox_module.Outbox(10.0, lambda _: None, Heartbeat(None, 1), 0)
    sender = SlowSender()
    outbox.open("1", sender)
    outbox.send("1", "accepted", last=False)
    outbox.after(done.set)
    assert not done.wait(0.1)
    taken.set()
    assert done.wait(10)
    assert sender.sent == [("accepted", 0)]
    outbox.close()
