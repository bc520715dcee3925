"""The process that runs a model, which Triton starts: what it does before anything else."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
STACK_VARIABLE = "PDSERVE_STACK_BYTES"
"""Set by pdctl where it has raised the server's limit of stacks: bytes; -1 is unlimited."""
_UNLIMITED_STACK_BYTES = 8 << 20
"""What threads get where there is no limit."""


def prepare() -> None:
    """Shared memory of this process's own user alone; stacks as if the server had usual ones.

    To be called first in a model's ``initialize``, so that it is not READY before. Triton makes
    the region of a stub with mode 0644, whatever the umask, and requests travel in it.
    """
    for region in _mapped():
        region.chmod(0o600)
    _restore_stacks()


def _mapped() -> set[Path]:
    """Shared memory that this process has mapped, and that still has its name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in found if path.parent == SHM and path.exists()}


def _restore_stacks() -> None:
    """The limit for what this process starts, and the stacks of its own threads from now on.

    glibc has taken the default of the latter from the limit when the process started.
    """
    given = os.environ.pop(STACK_VARIABLE, None)
    if given is None:
        return
    soft = int(given)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    size = _UNLIMITED_STACK_BYTES if soft == resource.RLIM_INFINITY else soft
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(64)  # sizeof(pthread_attr_t) is 56 on x86-64
    failed = (
        libc.pthread_attr_init(attributes)
        or libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size))
        or libc.pthread_setattr_default_np(attributes)
    )
    if failed:
        raise OSError(failed, os.strerror(failed))
