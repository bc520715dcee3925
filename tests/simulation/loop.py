"""Virtual time, and processes that are stopped or end in it, all of them in one event loop.

Time passes when nothing is left to do, and jumps to the next timer. All tasks, timers and threads
of a process are marked by a context variable, so that the whole process can be stopped, as by
SIGSTOP, and ended, as by SIGKILL. Nothing depends on the real clock or on threads that race, so
that a seed always gives the same history.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import async_solipsism

from tests.simulation.threads import Clock, Crew, Thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Executor

# The loop may take this many turns at one instant, which is far more than any burst takes.
MOST_TURNS = 20_000

_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """A model of an operating system's process, from its beginning to its end."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self.since = loop.time()
        """The time when it began, or last continued after it was stopped."""
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.threads: dict[Thread, None] = {}
        self._loop = loop
        self._context = contextvars.copy_context()
        self._context.run(_process.set, self)
        self._backlog: list[asyncio.Handle] = []
        self._over = False

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Schedule a function to be called in it soon."""
        self._loop.call_soon(function, *args, context=self._context)

    def call_at(self, when: float, function: Callable[..., object], *args: Any) -> None:
        self._loop.call_at(when, function, *args, context=self._context)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in it now."""
        return self._context.copy().run(function, *args)

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task in it."""
        task: asyncio.Task[Any] = self.run(self._loop.create_task, work)
        return task

    def stop(self) -> None:
        """Stop it: none of it runs until `go_on`."""
        self.stopped = True

    def go_on(self) -> None:
        """Continue it: all that has become due meanwhile happens at once."""
        self.stopped = False
        self.since = self._loop.time()
        self._loop.resume(self._backlog)
        self._backlog = []

    async def end(self) -> None:
        """End it at once: `alive` is false before its tasks and threads unwind."""
        self.alive = False
        self.go_on()
        for thread in list(self.threads):
            thread.step()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._over = True

    def takes(self, handle: asyncio.Handle) -> bool:
        """Return whether a callback may run now; it is kept for later if the process is stopped."""
        if self.stopped:
            self._backlog.append(handle)
            return False
        return not self._over


class _Handle(asyncio.Handle):
    def _run(self) -> None:
        process = self._context.get(_process)  # type: ignore[attr-defined]
        if process is None or process.takes(self):
            super()._run()


class _TimerHandle(asyncio.TimerHandle):
    def _run(self) -> None:
        process = self._context.get(_process)  # type: ignore[attr-defined]
        if process is None or process.takes(self):
            super()._run()


class Loop(async_solipsism.EventLoop):  # type: ignore[misc]
    """An event loop that calls `instant` when all that can happen at one moment has happened."""

    def __init__(self) -> None:
        super().__init__()
        self.instant: Callable[[], None] = _nothing
        self.thread: Thread | None = None
        """The thread that runs now."""
        self.clock = Clock(self)
        self._turns = 0
        self._crews: dict[Executor | None, Crew] = {}
        self.set_task_factory(_task)

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        # The clock of this loop counts whole microseconds.
        timer = _TimerHandle(math.ceil(when * 1e6 - 1e-3) / 1e6, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def resume(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def run_in_executor(
        self, executor: Executor | None, function: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run as many calls at once as the executor has threads, all in virtual time."""
        if executor not in self._crews:
            self._crews[executor] = Crew(getattr(executor, "_max_workers", 32))
        process, crew = _process.get(), self._crews[executor]
        assert process is not None
        thread = Thread(self, process, crew, function, args)
        crew.send(thread)
        return thread.future

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the work to its end, then close. An error that nobody has handled is raised, too."""
        unheard: list[str] = []

        def hear(_: object, context: dict[str, Any]) -> None:
            process = _process.get()
            if process is None or process.alive:  # else its tasks are being ended
                unheard.append(repr(context))

        self.set_exception_handler(hear)
        task = self.create_task(work)
        try:
            self.run_until_complete(task)
        except BaseException:
            # `instant` has raised, and the work knows nothing of it.
            self.instant, self._turns = _nothing, 0
            task.cancel()
            with suppress(asyncio.CancelledError):
                self.run_until_complete(task)
            raise
        finally:
            self.run_until_complete(self.shutdown_asyncgens())
            self.close()
        assert not unheard, unheard

    def _run_once(self) -> None:
        self._turns += 1
        assert self._turns < MOST_TURNS, "no time passes: something goes round in circles"
        if not self._ready and not self._stopping:
            self.instant()
            self._turns = 0
        super()._run_once()


def _nothing() -> None:
    pass


def _task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    task = asyncio.Task(work, loop=loop, **options)
    if (process := _process.get()) is not None:
        process.tasks[task] = None
        task.add_done_callback(process.tasks.pop)
    return task
