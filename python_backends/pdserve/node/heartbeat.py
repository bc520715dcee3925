"""How often the threads of a model have turned, and what they have done, in shared memory.

A watchdog reads it without asking anybody, so that it needs no place behind the requests of
clients. There is one for each model of a server that ``pdctl`` has started: words of 64 bits, first
the process id once the model is loaded, then two words for each thread.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
WORD = 8


class Beats(NamedTuple):
    """What one thread has counted since its start."""

    turns: int
    """Passes of its loop, which goes on when there is nothing to do; 0: it has no such loop."""
    work: int
    """Requests that it has taken, and responses that it has given."""


def path(token: str, model: str) -> Path:
    """Where the heartbeat of a model is; the token is that of its server's start."""
    return SHM / f"{token}-{model}.heartbeat"


class Heartbeat:
    """The heartbeat of this process: each of its threads counts for itself.

    Args:
        path: of the shared memory, which replaces what a former life has left there; None: nobody
            will read it.
        threads: how many threads count.

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
                # Without this, a full file system would show as SIGBUS at the first count.
                os.posix_fallocate(fd, 0, size)
                self._inode = os.fstat(fd).st_ino
                memory = memoryview(mmap.mmap(fd, size))
            finally:
                os.close(fd)
        self._words = memory.cast("Q")

    def close(self) -> None:
        """Leave nothing behind. One of a later life is left alone; counting stays possible."""
        if self._path is not None:
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    def loaded(self) -> None:
        """The model's ``initialize`` returns now."""
        self._words[0] = os.getpid()

    def turned(self, thread: int) -> None:
        """The thread goes on."""
        self._words[1 + 2 * thread] += 1

    def worked(self, thread: int) -> None:
        """The thread has taken a request, or given a response."""
        self._words[2 + 2 * thread] += 1


def read(path: Path) -> list[Beats]:
    """What each thread has counted, the first thread first; empty: there is no heartbeat."""
    words = _words(path)
    return [Beats(*words[at : at + 2]) for at in range(1, len(words), 2)]


def loaded(path: Path) -> int | None:
    """The process that has loaded the model; None: it has not, or there is no heartbeat."""
    return next(iter(_words(path)), 0) or None


def _words(path: Path) -> list[int]:
    try:
        return memoryview(path.read_bytes()).cast("Q").tolist()
    except OSError:
        return []
