"""Counters of the turns and the work of a model's threads, in shared memory.

A watchdog reads them without a message, and so does not wait behind the requests of clients. There
is one heartbeat for each model of a server that ``pdctl`` has started: words of 64 bits, first the
process id once the model is loaded, then two words for each thread.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
WORD = 8
STILL_S = 3.0
"""Seconds without a turn after which a thread counts as standing still."""


class Beats(NamedTuple):
    """The counters of one thread since its start."""

    turns: int
    """Number of passes of its loop, which continues when there is nothing to do; 0: it has no such
    loop."""
    work: int
    """Number of requests that it has taken, and responses that it has sent."""


def path(token: str, model: str) -> Path:
    """Return the path of a model's heartbeat; the token is that of its server's start."""
    return SHM / f"{token}-{model}.heartbeat"


class Heartbeat:
    """The heartbeat of this process, in which each of its threads counts separately.

    Args:
        path: path of the shared memory, replacing that of a former process; None: nobody will read
            it.
        threads: number of threads that count.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, path: Path | None, threads: int) -> None:
        size = (1 + 2 * threads) * WORD
        self._path = path
        self._inode = 0
        if path is None:
            memory = memoryview(bytearray(size))
        else:
            with suppress(FileNotFoundError):
                path.unlink()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Otherwise a full file system would cause SIGBUS at the first count.
                os.posix_fallocate(fd, 0, size)
                self._inode = os.fstat(fd).st_ino
                memory = memoryview(mmap.mmap(fd, size))
            finally:
                os.close(fd)
        self._words = memory.cast("Q")
        self._turned_at: list[float | None] = [None] * threads

    def close(self) -> None:
        """Remove the shared memory, unless a later process has replaced it.

        Counting stays possible.
        """
        if self._path is not None:
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    def loaded(self) -> None:
        """Note that the model's ``initialize`` returns now."""
        self._words[0] = os.getpid()

    def turned(self, thread: int) -> None:
        """Count a pass of the thread's loop."""
        self._words[1 + 2 * thread] += 1
        self._turned_at[thread] = time.monotonic()

    def standing(self) -> str:
        """Return which thread has made no turn for STILL_S, and for how long; empty: none."""
        now = time.monotonic()
        for thread, turned_at in enumerate(self._turned_at):
            if turned_at is not None and now - turned_at > STILL_S:
                return stands(thread, now - turned_at)
        return ""

    def worked(self, thread: int) -> None:
        """Count a request that the thread has taken, or a response that it has sent."""
        self._words[2 + 2 * thread] += 1


def stands(thread: int, seconds: float) -> str:
    """Say that a thread stands still: the first is the event loop, and the others send."""
    which = f"sending thread {thread}" if thread else "event loop"
    return f"its {which} has stood still for {seconds:.1f} s"


def read(path: Path) -> list[Beats]:
    """Return the counters of each thread, the first thread first; empty: there is no heartbeat."""
    words = _words(path)
    return [Beats(*words[at : at + 2]) for at in range(1, len(words), 2)]


def loaded(path: Path) -> int | None:
    """Return the process that has loaded the model; None: it has not, or there is no heartbeat."""
    return next(iter(_words(path)), 0) or None


def _words(path: Path) -> list[int]:
    try:
        return memoryview(path.read_bytes()).cast("Q").tolist()
    except OSError:
        return []
