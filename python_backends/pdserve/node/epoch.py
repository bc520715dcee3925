"""Names one life of an instance: the process in which it runs.

The process tells it with all that it says, and whoever can look at the process finds it by itself.
So a watchdog can name the one that it has seen die, without having asked it anything before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pdserve.kvcache.handle import EPOCH_BYTES

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 22
"""Field of /proc/PID/stat, counted from 1: clock ticks from the boot to the process's start."""


def of(pid: int) -> bytes:
    """EPOCH_BYTES that no other process has, of any machine; as seen in its own PID namespace.

    Raises:
        OSError: there is no such process. A zombie still is one.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The second field is the name in parentheses, which may have blanks and parentheses itself.
    started = stat.rpartition(")")[2].split()[_START_TIME - 3]
    name = f"{_BOOT_ID.read_text().strip()} {pid} {started}"
    return hashlib.blake2b(name.encode(), digest_size=EPOCH_BYTES).digest()
