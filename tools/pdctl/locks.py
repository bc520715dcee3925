"""One command at a time starts a server, or cleans up what is left of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pdctl.errors import ServerError

LOCK_S = 30.0
"""For another command to have started or cleaned up the same server."""


def opened(path: Path) -> int:
    """A descriptor of a file to lock, made if it can be.

    A lock itself needs no room on the disk, and no right to write.

    Raises:
        OSError: there is none, and it cannot be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return os.open(path, os.O_RDONLY)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else has the server of a folder in hand.

    Raises:
        ServerError: somebody has, for LOCK_S.
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
