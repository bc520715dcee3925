"""Room in the decodes, checked before a prompt is computed: a request without a place waits.

A decode reports what it could still accept with replies that are sent anyway. From that the gateway
subtracts what it has promised since: to requests whose prompt waits or is being computed, and that
no decode has accepted yet. A decode that has reported nothing counts as having room. Other gateways
promise the same room: where there is not enough for all requests that could come at once, a first
token is held back until a decode has accepted its request; where there was enough by an older
report, it is held back for a moment at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pdserve.scheduling.instance import Instance
from pdserve.scheduling.order import Order

KNOWN_S = 1.0
"""Seconds for which a decode's report is recent enough to send a first token before a decode has
accepted."""
HELD_S = 0.1
"""Seconds for a decode to accept where its report is older: far more than a healthy one needs."""
# Factor by which the largest request seen is reduced with each new request.
FADING = 0.99
LOOK = 32
"""Number of decodes that are compared; in groups of up to this size all are."""
SLACK = 0.75
"""In larger groups, least ratio of the largest request to the size that is counted with: counting
anew for another size means looking at all decodes."""


class Rooms:
    """Finds room in the decodes of a group.

    Its orders are maintained as decodes report, so that a request need not look at all of them.

    Args:
        blocks: KV blocks of each decode.
        block_size: tokens of each block.
        at_once: requests that all gateways together may bring before any of them learns of it.
    """

    def __init__(
        self, decodes: Sequence[Instance], blocks: int, block_size: int, at_once: int
    ) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._largest = 1.0
        self._changed: set[Instance] = set()
        self._numbers = itertools.count()
        self._members: dict[Instance, int] = {}
        self._failed = Order[tuple[float, int]]()
        """Decodes that have failed, by the time from which they may be tried."""
        self._roomy = Order[tuple[int, int]]()
        """Decodes that have not failed and may have room, by the number of requests that they
        serve."""
        self._free = Order[tuple[int, int]]()
        """The decodes of ``_roomy`` that have reported their room, by their free blocks."""
        self._plenty = Plenty()
        self.update(decodes, at_once)

    def update(self, decodes: Sequence[Instance], at_once: int) -> None:
        """Replace the decodes; what is known of those that stay is kept."""
        self._at_once = at_once
        for gone in self._members.keys() - set(decodes):
            gone.listeners.remove(self._changed.add)
            self._changed.discard(gone)
            self._failed.put(gone, None)
            self._roomy.put(gone, None)
            self._free.put(gone, None)
            self._plenty.forget(gone)
            del self._members[gone]
        for decode in decodes:
            if decode not in self._members:
                decode.listeners.append(self._changed.add)
                self._changed.add(decode)
                self._members[decode] = next(self._numbers)

    def need(self, tokens: int) -> int:
        """Return the blocks for ``tokens`` tokens.

        0 if no decode has as many, since one will refuse.
        """
        blocks = -(-tokens // self._block_size)
        if blocks > self._blocks:
            return 0
        self._largest = max(blocks, self._largest * FADING)
        return blocks

    def find(self, blocks: int, now: float) -> Instance | None:
        """Return the decode that has room for ``blocks`` blocks and serves the fewest requests.

        Where the first LOOK decodes have too little room, it is the one with the most.

        A failed decode has room for a trial, whatever it has reported: the report may be of a
        former life, and it is not watched before it has recovered. If all have failed, the request
        waits for whichever recovers first.
        """
        self._renew()
        found = []
        for (reopens, _), one in self._failed:
            if reopens > now:
                break
            if one.breaker.allows(now, one.room.slots):
                found.append(one)
        if self._failed and not found and len(self._failed) == len(self._members):
            found = [one for _, one in self._failed if one.room.fits(blocks)]
        if (best := self._first(blocks)) is not None:
            found.append(best)
        return min(found, key=self._load) if found else None

    def _first(self, blocks: int) -> Instance | None:
        for looked, (_, decode) in enumerate(self._roomy):
            if looked == LOOK:
                break
            if decode.room.fits(blocks):
                return decode
        most = self._free.last
        return most if most is not None and most.room.fits(blocks) else None

    def plenty(self, now: float, age_s: float = KNOWN_S) -> bool:
        """Tell whether all requests that may come at once, from any gateway, find a place.

        A failed decode counts as having no room until it has recovered.

        Args:
            age_s: seconds after which a report does not count any more.
        """
        self._renew()
        return self._plenty.takes(now - age_s) >= self._at_once

    def _load(self, decode: Instance) -> tuple[int, int]:
        return decode.load.open + decode.room.slots, self._members[decode]

    def _renew(self) -> None:
        if self._plenty.size(math.ceil(self._largest), exact=len(self._members) <= LOOK):
            self._changed.update(self._members)
        if not self._changed:
            return
        for decode in self._changed:
            room, well = decode.room, decode.breaker.closed
            tried = None if well else (decode.breaker.reopens, self._members[decode])
            self._failed.put(decode, tried)
            if well:
                self._plenty.look_at(decode, self._members[decode])
            else:
                self._plenty.forget(decode)
            roomy = well and room.fits(1)
            told = roomy and room.told is not None
            self._roomy.put(decode, self._load(decode) if roomy else None)
            self._free.put(decode, (room.free, self._members[decode]) if told else None)
        self._changed.clear()


class Plenty:
    """Number of requests of the largest size that find room, maintained as decodes report."""

    def __init__(self) -> None:
        self._blocks = 1
        self._unknown: set[Instance] = set()
        self._takes: dict[Instance, int] = {}
        self._sum = 0
        self._fresh = Order[tuple[float, int]]()
        """Decodes that have reported lately, by the time of their report."""
        self._fresh_sum = 0
        self._since = -math.inf

    def size(self, blocks: int, *, exact: bool) -> bool:
        """Set the size of the largest request, in blocks.

        True: all decodes are to be counted again.
        """
        least = self._blocks if exact else SLACK * self._blocks
        if least <= blocks <= self._blocks:
            return False
        self._blocks = blocks
        return True

    def look_at(self, decode: Instance, number: int) -> None:
        """Count a healthy decode, which may have reported its room.

        Args:
            number: the decode's own number.
        """
        room = decode.room
        if room.told is None:
            self.forget(decode)
            self._unknown.add(decode)
            return
        takes, known = room.most(self._blocks), self._fresh.key(decode)
        if known == (room.told_at, number) and self._takes[decode] == takes:
            return
        self.forget(decode)
        self._takes[decode] = takes
        self._sum += takes
        if room.told_at > self._since:
            self._fresh.put(decode, (room.told_at, number))
            self._fresh_sum += takes

    def forget(self, decode: Instance) -> None:
        """Count a decode as having no room."""
        self._unknown.discard(decode)
        takes = self._takes.pop(decode, 0)
        self._sum -= takes
        self._age(decode, takes)

    def _age(self, decode: Instance, takes: int) -> None:
        if self._fresh.key(decode) is not None:
            self._fresh.put(decode, None)
            self._fresh_sum -= takes

    def takes(self, since: float) -> float:
        """Return how many requests find room, by reports after ``since``.

        Infinity: some is not known.

        Args:
            since: no less than in the previous call, or minus infinity.
        """
        if self._unknown:
            return math.inf
        if since == -math.inf:
            return self._sum
        self._since = since
        while (first := self._fresh.first) is not None and first[0][0] <= since:
            self._age(first[1], self._takes[first[1]])
        return self._fresh_sum
