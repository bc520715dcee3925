"""Which processes are alive: each holds a lock on a file, which the kernel releases at its end.

No clock is involved. A process that is killed is noticed at once; one that is stopped (SIGSTOP)
counts as alive. A child that was forked without another program, and outlives its parent, keeps the
parent's lock.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path


class LivenessLock:
    """The sign that this process is alive; its `name` is never used twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        while True:
            self.name = secrets.token_hex(8)
            self._file = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._file).st_nlink:
                    return
            os.close(self._file)  # somebody took it for the file of a dead process

    @property
    def _path(self) -> Path:
        return self._folder / self.name

    def close(self) -> None:
        """Count as dead from now on."""
        os.close(self._file)


def is_dead(folder: Path, name: str) -> bool:
    """Tell whether the process of a holder has ended; then its file is removed."""
    path = folder / name
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may ask at the same time
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)


def sweep(folder: Path) -> None:
    """Remove the files of dead processes."""
    for path in folder.iterdir():
        is_dead(folder, path.name)
