"""Files and folders of this user alone, whatever the umask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

UMASK = 0o077
"""Of pdctl and of what it starts: what they write is their user's."""


def folder(path: Path) -> None:
    """A folder of mode 0700, made if there is none.

    One that somebody else owns, such as a mounted volume, stays as it is.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o700)


def opened(path: Path) -> BinaryIO:
    """A file of mode 0600, emptied, to be written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(descriptor, 0o600)  # of one that was there
    return os.fdopen(descriptor, "wb")


def write(path: Path, data: bytes) -> None:
    """A file of mode 0600 with this content."""
    with opened(path) as file:
        file.write(data)


def tree(path: Path) -> None:
    """Everything from a folder down: folders of mode 0700, files of mode 0600."""
    path.chmod(0o700)
    for inner in path.rglob("*"):
        if not inner.is_symlink():
            inner.chmod(0o700 if inner.is_dir() else 0o600)
