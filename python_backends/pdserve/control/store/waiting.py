"""A wait with a time limit that can be cancelled at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], seconds: float) -> T:
    """Return the result of work that is given up after so many seconds.

    Before Python 3.12 `asyncio.wait_for` forgets that it is cancelled if there is a result at the
    same moment; what waits in a loop then goes on for ever.

    Raises:
        asyncio.TimeoutError: it has been given up.
    """
    future = asyncio.ensure_future(work)
    try:
        await asyncio.wait([future], timeout=seconds)
    finally:
        if not future.done():
            future.cancel()
            await asyncio.wait([future])
    if future.cancelled():
        raise asyncio.TimeoutError
    return future.result()
