"""Locks that let one command at a time start a server or clean up after it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pdctl.errors import ServerError

LOCK_S = 30.0
"""Seconds for another command to start the same server, or to clean up after it."""


def opened(path: Path) -> int:
    """Return a descriptor of a file to lock, which is made if possible.

    A lock needs no space on the disk, and no permission to write.

    Raises:
        OSError: there is no such file, and it cannot be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return os.open(path, os.O_RDONLY)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a server's folder.

    Raises:
        ServerError: another command has held it for LOCK_S.
    """
    lock = opened(folder / "lock")
    deadline = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"server {folder.name}: another pdctl has been starting or stopping it for "
                        f"{LOCK_S:g} s"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
