"""Resource limits that a server starts with, where they differ from this process's own."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdserve.triton.stub import STACK_VARIABLE

STACK_BYTES = 256 << 20
"""Of a thread of ``tritonserver``, virtual: glibc gives every thread the soft limit of stacks.

Triton's own parsing of a request needs more of it for some requests than for others. This gives it
32 times the usual 8 MiB: it moves a threshold, and removes none.
"""
Limit = tuple[int, int]
"""Soft and hard."""


@contextmanager
def raised() -> Iterator[dict[str, str]]:
    """Whatever is started within the block has a server's limits: a place to start one thing only.

    Yields:
        what its environment needs.
    """
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
    """What a server gets that is given this limit of stacks.

    Args:
        room: address space is not counted; otherwise threads may be refused for it.
    """
    soft, hard = given
    # Without any limit glibc takes 2 MiB.
    if not room or STACK_BYTES <= soft != resource.RLIM_INFINITY:
        return given
    return (STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)), hard


def _has_room() -> bool:
    """Neither a limit of this process (``ulimit -v``) nor the kernel counts address space."""
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft == resource.RLIM_INFINITY and overcommit != "2"
