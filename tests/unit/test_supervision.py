"""Tests that background work does not end unnoticed while its process runs."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from pdserve import supervision
from pdserve.supervision import RETRY_S, Background, Thread, repeat
from tests.unit.inprocess import virtual


def listen() -> list[str]:
    """Install in the running loop; return the exit status the process would end with."""
    reasons: list[str] = []
    supervision.install(asyncio.get_running_loop(), reasons.append)
    return reasons


@pytest.fixture(autouse=True)
def _usual_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


async def fail() -> None:
    await asyncio.sleep(1)
    raise ValueError("-39 tokens")


@virtual
async def test_a_task_that_raises_ends_the_process() -> None:
    reasons = listen()
    background = Background()
    background.start(fail())
    await asyncio.sleep(2)
    (reason,) = reasons
    assert reason.startswith("fail has ended\n")
    assert "Traceback" in reason
    assert "in fail" in reason
    assert reason.endswith(" in fail)")
    assert "\nValueError (" in reason
    assert "-39" not in reason.rpartition("\n")[2], "it may be a client's value"
    assert len(background) == 0


@virtual
async def test_a_task_that_a_stranger_cancels_ends_the_process() -> None:
    """A cancelled future of an engine would otherwise end a loop silently."""
    reasons = listen()

    async def waits_for_a_cancelled_future() -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1, future.cancel)
        await future

    Background().start(waits_for_a_cancelled_future())
    await asyncio.sleep(2)
    (reason,) = reasons
    assert "waits_for_a_cancelled_future has ended" in reason
    assert "CancelledError" in reason


@virtual
async def test_what_its_owner_ends_or_what_returns_is_no_death() -> None:
    reasons = listen()
    background = Background()
    background.start(asyncio.sleep(1), asyncio.sleep(1000))
    await asyncio.sleep(2)
    assert len(background) == 1
    await background.close()
    background.cancel()
    assert not reasons


@virtual
async def test_failures_of_others_are_logged_and_end_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reasons = listen()

    def callback() -> None:
        raise KeyError("of a callback")

    asyncio.get_running_loop().call_soon(callback)
    await asyncio.sleep(1)
    thread = threading.Thread(target=callback, name="somebody's")
    thread.start()
    thread.join()
    assert not reasons
    assert "\nKeyError (" in caplog.text
    assert "thread somebody's has ended" in caplog.text
    assert caplog.text.count("Traceback") == 2


@virtual
async def test_a_thread_that_raises_ends_the_process() -> None:
    reasons = listen()

    def run() -> None:
        raise SystemExit(3)  # Python lets a thread end silently by this exception

    thread = Thread(target=run, name="outbox")
    thread.start()
    thread.join()
    (reason,) = reasons
    assert reason.startswith("thread outbox has ended\n")
    assert "\nSystemExit (" in reason


@virtual
async def test_work_that_harms_nobody_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    began, turns = loop.time(), list[float]()

    async def turn() -> float:
        turns.append(loop.time() - began)
        if len(turns) == 2:
            raise OSError("no metrics today")
        return 1.0

    reasons = listen()
    background = Background()
    background.start(repeat("publishing", turn))
    await asyncio.sleep(RETRY_S + 2.5)
    await background.close()
    assert turns == pytest.approx([0.0, 1.0, 1.0 + RETRY_S, 2.0 + RETRY_S], abs=1e-3)
    assert not reasons
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    said = "publishing has failed, and is tried again in 5 s\n"
    assert record.getMessage().startswith(said)
    assert "\nOSError (" in caplog.text


@virtual
async def test_nothing_is_installed_in_a_test() -> None:
    """The loop's default handler is called, and the process continues."""
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    Background().start(fail())
    await asyncio.sleep(2)
    assert [context["message"] for context in heard] == ["fail has ended"]
