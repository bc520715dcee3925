"""Tasks and threads that run as long as their process, and whose unexpected end ends the process.

A process without its decode loop, for example, still accepts requests and never answers one, which
is noticed only after the time of a stall. One that has ended is noticed and restarted within half a
second. So work that must not end is started here; `install` sets how a process ends. Without it (in
tests, in a simulation) an end is only reported to the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from pdserve import errors

_log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Pause after a failed turn of `repeat`, in seconds, and so the interval of its log lines."""
_FATAL = "fatal"
"""Key in a context of the loop's exception handler: the process cannot go on."""


class Background:
    """Tasks that run until they return, or until their owner ends them.

    A task that raises, or is cancelled by anyone else, is reported with its traceback as fatal.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False

    def __len__(self) -> int:
        """Return the number of tasks that have not ended."""
        return len(self._tasks)

    def start(self, *works: Coroutine[Any, Any, None]) -> None:
        """Run each coroutine as a task in the running loop."""
        for work in works:
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """Cancel all tasks; calling it again is no error."""
        self._over = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
        elif not self._over:
            error = asyncio.CancelledError("cancelled by nobody who may")
        if error is not None:
            what = getattr(task.get_coro(), "__qualname__", task.get_name())
            context = {"message": f"{what} has ended", "exception": error, _FATAL: True}
            task.get_loop().call_exception_handler(context)


class Thread(threading.Thread):
    """A thread whose exception is fatal."""


async def repeat(
    what: str, turn: Callable[[], Awaitable[float]], soon: asyncio.Event | None = None
) -> None:
    """Call `turn` again and again until cancelled, for work whose failure harms no request.

    Args:
        what: the work, for the log.
        turn: returns the seconds until it is called again. If it raises, that is logged with its
            traceback, and it is called again after `RETRY_S`.
        soon: set to have it called again at once.
    """
    again = soon or asyncio.Event()
    while True:
        try:
            pause_s = await turn()
        except Exception as error:
            _log.error(
                "%s has failed, and is tried again in %g s\n%s", what, RETRY_S, traced(error)
            )
            pause_s = RETRY_S
        timer = asyncio.get_running_loop().call_later(pause_s, again.set)
        try:
            await again.wait()
        finally:
            timer.cancel()
        again.clear()


def install(loop: asyncio.AbstractEventLoop, end: Callable[[str], None]) -> None:
    """Make fatal errors end this process.

    Exceptions of callbacks and of other tasks and threads that nothing has handled are logged.

    Args:
        end: called with the reason and its traceback; it does not return.
    """

    def unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        text = _told(context["message"], context.get("exception"))
        if context.get(_FATAL):
            end(text)
        _log.error(text)

    def uncaught(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "a thread"
        text = _told(f"thread {name} has ended", args.exc_value)
        if isinstance(args.thread, Thread):
            end(text)
        _log.error(text)

    loop.set_exception_handler(unhandled)
    threading.excepthook = uncaught


def traced(error: BaseException) -> str:
    """Return an error's traceback for the log, with what may be said of the error itself."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{errors.loggable(error)}"


def _told(message: str, error: BaseException | None) -> str:
    return f"{message}\n{traced(error)}" if error else message
