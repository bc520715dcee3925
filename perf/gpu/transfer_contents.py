"""The receiving memory of a transfer, and whether it holds what was sent."""

from __future__ import annotations

import random

from pdserve.kvcache.layout import KVLayout
from pdserve.transfer.arrays import Array
from pdserve.transfer.scatter import Runs
from perf.gpu.place import Place
from perf.transfer.layouts import pattern


class Contents:
    """A paged pool with room for one KV cache, and a copy of what its holder has.

    Args:
        most: tokens of the largest KV cache.
    """

    def __init__(self, place: Place, layout: KVLayout, most: int) -> None:
        self._place = place
        self._layout = layout
        self.pool = place.empty(*layout.shape(most))
        """Uint8 [planes, rows, row_bytes]."""
        self.flat: Array = self.pool.reshape(-1)
        """The pool as one range."""
        self.sent = place.load(pattern(layout.nbytes(most)))
        """Uint8 [bytes of the largest KV cache]."""

    def in_pool(self, tokens: int, runs: Runs) -> bool:
        """Tell whether the runs hold what was sent, and clear the pool."""
        sent = self.sent[: self._layout.nbytes(tokens)].reshape(self._layout.shape(tokens))
        start, right = 0, True
        for first, rows in runs:
            arrived = self.pool[:, first : first + rows]
            right = right and self._place.same(arrived, sent[:, start : start + rows])
            start += rows
        return self._cleared(self.pool, right)

    def in_spans(self, tokens: int, block: int) -> bool:
        """Tell the same of blocks that hold all planes, the last one first."""
        nbytes = self._layout.nbytes(tokens)
        shape = tokens // block, block * self._layout.bytes_per_token
        arrived, sent = (one[:nbytes].reshape(shape) for one in (self.flat, self.sent))
        pairs = zip(reversed(range(len(arrived))), range(len(sent)), strict=True)
        right = all(self._place.same(arrived[there], sent[here]) for there, here in pairs)
        return self._cleared(self.pool, right)

    def arrived(self, room: Array, nbytes: int) -> bool:
        """Tell whether contiguous memory holds what was sent, and clear it."""
        return self._cleared(room, self._place.same(room[:nbytes], self.sent[:nbytes]))

    def _cleared(self, memory: Array, right: bool) -> bool:
        memory[:] = 0
        self._place.sync()
        return right


def shuffled(tokens: int, block: int) -> Runs:
    """Return runs of one block each, in random order, the same for the same number of tokens."""
    firsts = list(range(0, tokens, block))
    random.Random(tokens).shuffle(firsts)
    return [(first, block) for first in firsts]
