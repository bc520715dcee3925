"""The process that runs a model, which Triton starts: what it does before anything else."""

from __future__ import annotations

from pathlib import Path

SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies


def prepare() -> None:
    """Shared memory of this process's own user alone.

    To be called first in a model's ``initialize``, so that it is not READY before. Triton makes
    the region of a stub with mode 0644, whatever the umask, and requests travel in it.
    """
    for region in _mapped():
        region.chmod(0o600)


def _mapped() -> set[Path]:
    """Shared memory that this process has mapped, and that still has its name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in found if path.parent == SHM and path.exists()}
