"""The epoch of an instance: a name of the process in which it runs.

The process sends it with all replies, and anyone who can see the process can compute it. So a
watchdog can name a process that has died, without having asked it before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pdserve.kvcache.handle import EPOCH_BYTES

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 22
"""Field of /proc/PID/stat, counted from 1: clock ticks from the boot to the process's start."""


def of(pid: int) -> bytes:
    """Return EPOCH_BYTES that no other process has, on any machine; `pid` in its own PID namespace.

    Raises:
        OSError: there is no such process. A zombie is one.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The second field is the name in parentheses, which may contain blanks and parentheses itself.
    started = stat.rpartition(")")[2].split()[_START_TIME - 3]
    name = f"{boot()} {pid} {started}"
    return hashlib.blake2b(name.encode(), digest_size=EPOCH_BYTES).digest()


def boot() -> str:
    """Return a name of the time since this machine was started. Raises OSError."""
    return _BOOT_ID.read_text().strip()
