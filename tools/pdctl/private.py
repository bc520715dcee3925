"""Makes files and folders that only this user can access, whatever the umask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

UMASK = 0o077
"""The umask of pdctl and of what it starts: their files are their user's alone."""


def folder(path: Path) -> None:
    """Make a folder of mode 0700 if there is none.

    A folder of another owner, such as a mounted volume, stays as it is.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o700)


def opened(path: Path) -> BinaryIO:
    """Open an empty file of mode 0600 for writing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(descriptor, 0o600)  # for a file that was there
    return os.fdopen(descriptor, "wb")


def write(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 with this content."""
    with opened(path) as file:
        file.write(data)


def tree(path: Path) -> None:
    """Give all folders from this one down mode 0700, and all files mode 0600."""
    path.chmod(0o700)
    for inner in path.rglob("*"):
        if not inner.is_symlink():
            inner.chmod(0o700 if inner.is_dir() else 0o600)
