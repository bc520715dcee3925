"""The deployment's key, under which handles, endpoints and notices are sealed.

``pdctl`` makes it when it starts a deployment, and gives each server its own copy, so that models
that are loaded later use the same key whatever happens to the deployment's file. Each process reads
it once and keeps it.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from pdserve.config import Deployment
from pdserve.errors import DeploymentError
from pdserve.kvcache.handle import KEY_BYTES

VARIABLE = "PDSERVE_KEY_FILE"
"""Environment variable of a server's processes with the path of the server's own copy."""


def of(deployment: Deployment) -> bytes:
    """Return the key for a process of a server: its server's copy, else the deployment's file.

    A server that was started without ``pdctl`` has no copy, and perhaps no file exists: the first
    of its models makes it.

    Raises:
        DeploymentError: see `load`.
    """
    copy = os.environ.get(VARIABLE)
    return load(Path(copy)) if copy else make(Path(deployment.transfer.key_file))


def make(path: Path) -> bytes:
    """Return the key in a file, which is made (mode 0600) if there is none.

    One of several makers wins.

    Servers on several hosts must be given the same file.

    Raises:
        DeploymentError: it cannot be made; see also `load`.
    """
    try:
        if not path.exists():
            _make(path)
    except OSError as error:
        raise DeploymentError(f"key_file {path}: {error.strerror}") from error
    return load(path)


def load(path: Path) -> bytes:
    """Return the key in a file.

    Raises:
        DeploymentError: it cannot be read, has a wrong size, or others may read it.
    """
    try:
        found = path.stat()
        key = path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"key_file {path}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise DeploymentError(f"key_file {path} has {len(key)} bytes; a key has {KEY_BYTES}")
    mode = stat.S_IMODE(found.st_mode)
    # A secret of Kubernetes belongs to root and to the group of the pod (fsGroup).
    ours = found.st_gid in {os.getegid(), *os.getgroups()}
    if mode & (0o037 if ours else 0o077):
        raise DeploymentError(
            f"key_file {path} may be read by others; allowed: mode 0600 or 0400, and 0640 or 0440 "
            f"where its group is one of this process's; it has {mode:04o} and group {found.st_gid}"
        )
    return key


def copy(key: bytes, path: Path) -> None:
    """Write a key to a file that only its owner may read. Raises OSError."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, key)
    finally:
        os.close(fd)


def _make(path: Path) -> None:
    # Written to another name and linked: no process sees half a key, and one of several makers
    # wins.
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    copy(secrets.token_bytes(KEY_BYTES), aside)
    try:
        with aside.open("rb") as file:
            os.fsync(file)
        if not path.exists():
            os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink()
