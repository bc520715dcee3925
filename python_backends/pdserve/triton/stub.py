"""Preparation of the process that runs a model, which Triton starts."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
STACK_VARIABLE = "PDSERVE_STACK_BYTES"
"""Set by pdctl if it has raised the server's stack limit: bytes; -1 is unlimited."""
_UNLIMITED_STACK_BYTES = 8 << 20
"""Stack size of threads where there is no limit."""


def prepare() -> None:
    """Restrict shared memory to this process's user, and restore the usual stack sizes.

    Call it first in a model's ``initialize``, so that the model is not READY before. Triton makes
    the region of a stub with mode 0644, whatever the umask, and requests travel in it.
    """
    for region in _mapped():
        region.chmod(0o600)
    _restore_stacks()


def _mapped() -> set[Path]:
    """Return the shared memory that this process has mapped, and that still has its name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in found if path.parent == SHM and path.exists()}


def _restore_stacks() -> None:
    """Restore the limit for child processes, and the stack size of this process's later threads.

    glibc has set the default of the latter from the limit when the process started.
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
