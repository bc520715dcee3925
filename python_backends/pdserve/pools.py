"""Threads for work that may not run in the event loop, all of them started beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pdserve.errors import DeploymentError

START_S = 10.0


def started(
    threads: int, name: str, initializer: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """Return a pool of `threads` threads that are running already.

    A `ThreadPoolExecutor` starts a thread when there is work for it. If that fails, as under a
    limit on address space or processes, `submit` raises and nevertheless keeps the work: it would
    be done later, on memory that its request has freed. With every thread started, `submit` starts
    none.

    Raises:
        DeploymentError: the threads cannot be started.
    """
    pool = ThreadPoolExecutor(threads, name, initializer)
    together = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):  # none is idle before all have started
            pool.submit(together.wait, START_S)
        together.wait(START_S)
    except RuntimeError as error:
        together.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise DeploymentError(
            f"the {threads} threads of pool {name} cannot be started: {error!r}; see the limits of "
            "this process on address space (ulimit -v) and on processes (ulimit -u)"
        ) from error
    return pool
