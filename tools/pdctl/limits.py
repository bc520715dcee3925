"""Resource limits with which a server starts, where they differ from this process's own."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdserve.triton.stub import STACK_VARIABLE

STACK_BYTES = 256 << 20
"""Virtual stack size of ``tritonserver``'s threads: glibc gives each the soft limit of stacks.

Triton's own parsing of a request needs more of it for some requests than for others. This gives it
32 times the usual 8 MiB: it moves a threshold, and removes none.
"""
Limit = tuple[int, int]
"""Soft and hard limit."""
_one_at_a_time = threading.Lock()


@contextmanager
def raised() -> Iterator[dict[str, str]]:
    """Give whatever is started within the block a server's limits; start only one thing there.

    Yields:
        variables for its environment.
    """
    with _one_at_a_time:  # they are those of the whole process
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack = resource.getrlimit(resource.RLIMIT_STACK)
        wanted = stack_limit(stack, room=_has_room())
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
            resource.setrlimit(resource.RLIMIT_STACK, wanted)
            yield {STACK_VARIABLE: f"{stack[0]}"} if wanted != stack else {}
        finally:
            resource.setrlimit(resource.RLIMIT_STACK, stack)
            resource.setrlimit(resource.RLIMIT_NOFILE, files)


def stack_limit(given: Limit, *, room: bool) -> Limit:
    """Return the stack limit of a server that is given this limit.

    Args:
        room: address space is not limited; otherwise large stacks might keep threads from starting.
    """
    soft, hard = given
    # If there is no limit, glibc uses 2 MiB.
    if not room or STACK_BYTES <= soft != resource.RLIM_INFINITY:
        return given
    return (STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)), hard


def _has_room() -> bool:
    """Tell whether neither this process (``ulimit -v``) nor the kernel limits address space."""
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft == resource.RLIM_INFINITY and overcommit != "2"
