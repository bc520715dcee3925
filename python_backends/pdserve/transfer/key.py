"""The deployment's secret, under which handles and descriptions are sealed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from pdserve.errors import DeploymentError
from pdserve.kvcache.handle import KEY_BYTES


def load(path: Path) -> bytes:
    """The key in a file, which is made (mode 0600) by the first process that wants it.

    Servers on several hosts are given the same file.

    Raises:
        DeploymentError: it cannot be read or made, has another size, or others may read it.
    """
    try:
        if not path.exists():
            _make(path)
        mode = path.stat().st_mode
        key = path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"key_file {path}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise DeploymentError(f"key_file {path} has {len(key)} bytes; a key has {KEY_BYTES}")
    if mode & 0o077:
        raise DeploymentError(f"key_file {path} may be read by others; allowed: mode 0600 or 0400")
    return key


def _make(path: Path) -> None:
    # Written aside and linked: nobody ever sees half a key, and of several makers one wins.
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, secrets.token_bytes(KEY_BYTES))
        os.fsync(fd)
        if not path.exists():
            os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        os.close(fd)
        aside.unlink()
