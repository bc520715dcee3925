"""Tests for what a leader looks at beside the store, in virtual time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pdserve.control.decide import TICK_S
from pdserve.control.outlook import Outlook
from pdserve.observability.metrics import Registry
from tests.unit.control.fakes import deployment, now, virtually

if TYPE_CHECKING:
    from pdserve.config import Deployment


@virtually()
async def test_the_load_is_read_on_when_the_time_of_day_is_set_back() -> None:
    """It is set back by an hour while the pages are read."""
    reads = 0

    async def scrape(_: Deployment) -> dict[str, None]:
        nonlocal reads
        reads += 1
        return {}

    async def probe(*_: object) -> bool:
        return True

    made = deployment(2, 2)
    changed = asyncio.Event()
    outlook = Outlook(
        lambda: made, scrape, probe, Registry(), changed, lambda: now() - (3600 if reads else 0)
    )
    looking = asyncio.ensure_future(outlook.run())
    await asyncio.sleep(10 * TICK_S)
    looking.cancel()
    assert reads >= 10
