"""The transports that UCX has picked for an agent, which only its log reports.

UCX reads UCX_LOG_FILE once in a process, when the first agent is made. It is given a file without a
name; messages of UCX beside the tables go on to `logging`. Fatal errors, after which it ends the
process, still go to stderr.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

_VARIABLE = "UCX_LOG_FILE"
_KEPT = 1 << 17
"""Characters of the log that are kept; a link's tables have about 2,000."""
_ROW = re.compile(r"^\[[^+|]*\]\s+\|(.*)\|$")
_MESSAGE = re.compile(r"^\[.*UCX\s+(?:WARN|ERROR)\s+(.*)$")
_LANE = re.compile(r"[a-z]\w*/[^\s,|]+")
# UCX warns that a network has no reads of its own, which is configured on purpose: see
# `nixl/agent.py`.
_EXPECTED = "No zero-copy protocol found for get"


class _Log:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1
        self._end = 0
        self._text = ""

    @contextmanager
    def begun(self) -> Iterator[None]:
        with self._lock:
            # A user who has set a log file gets the log, and transports are not reported here.
            if self._fd >= 0 or _VARIABLE in os.environ:
                yield
                return
            self._fd = os.memfd_create("ucx-log")
            os.environ[_VARIABLE] = f"/proc/self/fd/{self._fd}"
            try:
                yield
            finally:
                del os.environ[_VARIABLE]

    def read(self) -> str:
        with self._lock:
            if self._fd < 0:
                return ""
            # UCX leaves its lines in the buffers of the C library.
            ctypes.CDLL(None).fflush(None)
            size = os.fstat(self._fd).st_size
            data = os.pread(self._fd, max(size - self._end, 0), self._end)
            if data:
                # UCX goes on writing at its offset, after a hole: what was read takes no memory.
                self._end += len(data)
                os.ftruncate(self._fd, 0)
            new = data.decode(errors="replace")
            self._text = (self._text + new)[-_KEPT:]
            text = self._text
        for line in new.splitlines():
            if (said := _MESSAGE.match(line)) and not said[1].startswith(_EXPECTED):
                _log.warning("UCX: %s", said[1])
        return text


_ucx = _Log()
begun = _ucx.begun
"""Context in which the first agent of this process is made."""


def picked(agent: str, operation: str) -> str:
    """Return what an agent's `operation` (of ucp: get or put) runs over; see `lanes`."""
    return lanes(_ucx.read(), agent, operation)


def lanes(log: str, agent: str, operation: str) -> str:
    """Return lanes such as "cma" or "rc_mlx5/mlx5_0:1+rc_mlx5/mlx5_1:1"; empty: the log has none.

    The log has a table for each kind of memory that was used; the last one counts.
    """
    owner = title = found = ""
    for line in log.splitlines():
        row = _ROW.match(line)
        if row is None:
            continue
        cells = [cell.strip() for cell in row[1].split("|")]
        if len(cells) == 1:
            owner, title = (cells[0], "") if " cfg#" in cells[0] else (owner, cells[0])
        elif owner.startswith(f"{agent} ") and " self " not in owner and f"_{operation}*" in title:
            # The last row is that of the largest sizes.
            names = dict.fromkeys(_LANE.findall(cells[-1]))
            found = "+".join(name.removesuffix("/memory") for name in names) or found
    return found
