"""The share of an instance that has joined a running gateway, which grows for a bounded time.

An empty instance has the least load, so that it would get all new requests until it has as many as
the others, all of them with cold caches and at the same moment. Its load counts more instead: with
the share 1/8 it counts as equally loaded when it has an eighth of the others' load. While the
others are busy it is offered whatever waits, since a share only orders instances.
"""

from __future__ import annotations

import asyncio

from pdserve.scheduling.load import Load

RAMP_S = 4.0
"""Seconds after which an instance that has joined has its whole share."""
STEPS = 8
"""Number of steps in which the share grows, the first at once."""


def begin(load: Load) -> None:
    """Give the instance of this load a growing share."""
    _step(load, 1)


def _step(load: Load, step: int) -> None:
    load.give_share(step / STEPS)
    if step < STEPS:
        asyncio.get_running_loop().call_later(RAMP_S / STEPS, _step, load, step + 1)
