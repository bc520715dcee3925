"""Waits for a request's first piece, also when nobody wants it any more.

A request that is aborted while its KV cache moves leaves blocks behind in the context engine that
nothing frees (ai-dynamo/dynamo#7489, #9349). Its first piece tells that nothing moves any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


async def first_piece(piece: Awaitable[T], drain_s: float) -> tuple[T, bool]:
    """Wait for a piece; if cancelled, for up to ``drain_s`` seconds more; 0: not at all.

    Returns the piece, and whether the wait was cancelled.

    Raises:
        CancelledError: it was cancelled and nothing came in time, or it was cancelled twice.
        Exception: what ``piece`` raises.
    """
    if not drain_s:
        return await piece, False
    task = asyncio.ensure_future(piece)
    try:
        return await asyncio.shield(task), False
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=drain_s)
        if not task.done():
            _log.warning(
                "a request that was given up had no piece within %g s and is aborted: if its "
                "KV cache was moving, its context engine may have lost blocks",
                drain_s,
            )
            raise
        return task.result(), True
    finally:
        task.cancel()
