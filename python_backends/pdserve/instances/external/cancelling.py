"""Ends the calls of an engine when its instance is closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

_log = logging.getLogger(__name__)

# A call that is cancelled twice ends at once, as soon as it has noticed that.
AGAIN_S = 0.05
CLOSE_S = 5.0


async def cancelled(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel calls until they have ended: the first time, one may wait for its transfer."""
    waiting = set(tasks)
    for _ in range(round(CLOSE_S / AGAIN_S)):
        if not waiting:
            return
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=AGAIN_S)
    if waiting:
        _log.error("%d calls of the engine do not end", len(waiting))
