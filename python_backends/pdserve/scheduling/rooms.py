"""Room in the decodes, asked for before a prompt is computed: who has no place waits without it.

A decode tells what it could still accept with replies that go anyway. From that the gateway takes
what it has promised since: to requests whose prompt waits or is being computed, and that no decode
has accepted yet. What no decode has told is not known, and counts as room. Other gateways promise
the same room: where there is not enough for all that could come at once, a first token is held back
until a decode has accepted its request; for a moment at most where there was enough, as was told a
while ago.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pdserve.scheduling.instance import Instance

KNOWN_S = 1.0
"""So long what a decode has told is good enough to let a first token go before it has accepted."""
HELD_S = 0.1
"""For a decode to accept, where what it has told is older: far more than one that is well needs."""
# How fast the largest request that has been seen is forgotten, with each that comes.
FADING = 0.99


class Rooms:
    """Finds room in the decodes of a group.

    Args:
        blocks: of each decode.
        block_size: tokens of each block.
        at_once: requests that all gateways together may bring before any of them hears of it.
    """

    def __init__(
        self, decodes: Sequence[Instance], blocks: int, block_size: int, at_once: int
    ) -> None:
        self._decodes = decodes
        self._blocks = blocks
        self._block_size = block_size
        self._at_once = at_once
        self._largest = 1.0

    def update(self, decodes: Sequence[Instance], at_once: int) -> None:
        """Go on with these decodes."""
        self._decodes = decodes
        self._at_once = at_once

    def need(self, tokens: int) -> int:
        """Blocks for so many tokens; what no decode has is 0, since it will be refused there."""
        blocks = -(-tokens // self._block_size)
        if blocks > self._blocks:
            return 0
        self._largest = max(blocks, self._largest * FADING)
        return blocks

    def find(self, blocks: int, now: float) -> Instance | None:
        """The decode with room for them that serves the fewest.

        One that has failed has room for a trial, whatever it has told: it may have said so in a
        former life, and is not watched before it has shown that it is well. If all have failed, the
        wait is for whichever is back.
        """
        well = [one for one in self._decodes if one.breaker.allows(now, one.room.slots)]
        found = [
            one
            for one in well or self._decodes
            if one.room.fits(blocks) or (well and not one.breaker.closed)
        ]
        return min(found, key=lambda one: one.open + one.room.slots) if found else None

    def plenty(self, now: float, age_s: float = KNOWN_S) -> bool:
        """Whether all that may come at once finds a place, whoever brings it.

        A decode that has failed has none, until it has shown that it is well.

        Args:
            age_s: what has been told longer ago counts for nothing.
        """
        rooms = [one.room for one in self._decodes if one.breaker.closed]
        if any(room.told is None for room in rooms):
            return True
        blocks = math.ceil(self._largest)
        known = (room.most(blocks) for room in rooms if now - room.told_at < age_s)
        return sum(known) >= self._at_once
