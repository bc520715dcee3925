"""Threads that keep virtual time: one runs at a time, from one sleep to the next."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from tests.simulation.loop import Loop, Process


class Killed(BaseException):
    """The process of a thread has ended."""


class Clock:
    """A clock of virtual time. It implements `pdserve.transfer.clock.Clock`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._looks = 0

    def monotonic(self) -> float:
        return self._loop.time()

    def perf_counter(self) -> float:
        """Return the time as if each call took a microsecond: then everything takes some time."""
        self._looks += 1
        return self._loop.time() + self._looks * 1e-6

    def sleep(self, seconds: float) -> None:
        assert self._loop.thread is not None, "the event loop itself would stand still"
        self._loop.thread.sleep(seconds)


class Crew:
    """The threads of one executor."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._waiting: deque[Thread] = deque()

    def send(self, thread: Thread) -> None:
        self._waiting.append(thread)
        self._next()

    def back(self) -> None:
        self._left += 1
        self._next()

    def _next(self) -> None:
        if self._left and self._waiting:
            self._left -= 1
            self._waiting.popleft().begin()


class Thread:
    """One call in a thread of a process. It and the event loop take turns."""

    def __init__(
        self,
        loop: Loop,
        process: Process,
        crew: Crew,
        function: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self._loop = loop
        self._process = process
        self._crew = crew
        self._call = function, args
        self._result: Any = None
        self._error: BaseException | None = None
        self._ended = False
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        self._process.threads[self] = None
        self._process.call(self.step)

    def step(self) -> None:
        """Let it run until it sleeps or ends. The loop's thread calls this."""
        if self._ended:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._loop.thread = self
        self._go.release()
        self._rests.acquire()
        self._loop.thread = None
        if self._ended:
            self._thread.join()
            del self._process.threads[self]
            self._crew.back()
            self._tell()

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass. The thread itself calls this."""
        self._live_on()
        when = self._loop.time() + max(seconds, 1e-6)
        self._process.call_at(when, self.step)
        self._rests.release()
        self._go.acquire()
        self._live_on()

    def _live_on(self) -> None:
        if not self._process.alive:
            raise Killed

    def _run(self) -> None:
        self._go.acquire()
        function, args = self._call
        try:
            self._live_on()
            self._result = function(*args)
        except BaseException as error:
            self._error = error
        self._ended = True
        self._rests.release()

    def _tell(self) -> None:
        if self.future.done():
            return
        if isinstance(self._error, Killed):
            self.future.cancel()
        elif self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)
