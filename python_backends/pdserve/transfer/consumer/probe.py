"""Measures a new link: its latency, and the cost of its moves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.clock import Clock
from pdserve.transfer.consumer import strategies
from pdserve.transfer.consumer.cost_model import Seen, Strategy
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.protocol import Link

Shape = tuple[int, int, int]
"""Planes, rows, and rows of a run."""
Way = Callable[[Shape, int], "Seen | None"]

PROBE_S = 2.0
"""Longest time of each measurement, in seconds."""
LOOKS = 5
TURNS = 5
ROW_BYTES = 1 << 10
# Shapes, the smaller first: from one row to 16 MiB, in one segment and in many. Small moves fit
# into caches and socket buffers, and tell nothing about large ones.
SHAPES = (
    *((1, 1, 1), (1, 16, 16), (1, 256, 256), (1, 256, 4)),
    *((1, 1024, 1024), (1, 1024, 64), (1, 1024, 8)),
    # Planes as large as those of long prompts: their runs are further apart than page tables in a
    # cache reach, which a scatter then pays for.
    *((4, 4096, 4096), (4, 4096, 64), (4, 4096, 8)),
)
# A link that takes this long for one shape is slow: the larger shapes would tell nothing new.
SLOW_S = 60e-3
COLD = 48 << 20
"""Bytes written before each move: more than the caches hold, so that the moved bytes are in
none."""
LARGE = 16 << 20
"""Bytes of the move by which a link's rate is reported."""
ONCE = 1 << 20
"""Bytes of a move that only has to arrive: of this size it takes another path than a lease slot."""


class Probe:
    """Measures links, by the staging buffers of their receiver. Thread-safe.

    Args:
        shapes: shapes of the moves that are measured, the smaller first.
        turns: number of moves of each.
        cold: bytes that are written before each move, so that no cache holds the moved ones.
    """

    def __init__(
        self,
        staging: Staging,
        clock: Clock = time,
        shapes: Sequence[Shape] = SHAPES,
        turns: int = TURNS,
        cold: int = COLD,
    ) -> None:
        self._staging = staging
        self._clock = clock
        self._shapes = shapes
        self._turns = turns
        self._cold = cold

    def latency(self, link: Link) -> float:
        """Return the median seconds of reading a lease slot.

        Raises:
            TransferError: the holder does not answer.
        """
        looks = []
        for _ in range(LOOKS):
            began = self._clock.perf_counter()
            link.peek(0, self._clock.monotonic() + PROBE_S)
            looks.append(self._clock.perf_counter() - began)
        return statistics.median(looks)

    def once(self, link: Link, data_bytes: int) -> None:
        """Move some bytes, to check that a link that is not mapped works.

        Raises:
            TransferError: it does not work, or no buffer became free.
        """
        deadline = self._clock.monotonic() + PROBE_S
        with self._staging.take(1, deadline) as (buffer,):
            span = 0, arrays.address(buffer), min(ONCE, self._staging.piece_bytes, data_bytes)
            link.pull(np.array([span], np.int64), deadline).wait()

    def moves(self, link: Link, data_bytes: int) -> dict[Strategy, list[Seen]]:
        """Measure moves of several shapes, of arbitrary bytes of the holder's data.

        The strategies take turns, so that a slow moment of the machine affects both.

        Raises:
            TransferError: the holder does not answer, or no buffer became free.
        """
        memory = self._staging.memory
        # Scattered bytes go to private memory; bytes pulled directly, to registered memory.
        own = arrays.like(memory, (min(LARGE, data_bytes),))

        def whole(shape: Shape, turn: int) -> Seen | None:
            move = _move(link, self._clock.monotonic() + PROBE_S, own, data_bytes, shape, turn)
            return self._timed(lambda move: strategies.whole(move, self._staging), move)

        def direct(shape: Shape, turn: int) -> Seen | None:
            with self._staging.take(len(memory), self._clock.monotonic() + PROBE_S) as buffers:
                alone = len(buffers) == len(memory)  # all buffers, which are contiguous
                room = memory.reshape(-1) if alone else buffers[0]
                move = _move(link, self._clock.monotonic() + PROBE_S, room, data_bytes, shape, turn)
                return self._timed(strategies.direct, move)

        seen = self._by_turns([whole, direct], arrays.like(memory, (self._cold,)))
        return {"whole": seen[0], "direct": seen[1]}

    def mapped(self, link: Link, data_bytes: int) -> float:
        """Return the bytes per second of copies out of mapped memory."""
        room = arrays.like(self._staging.memory, (self._staging.memory.nbytes,))

        def copy(shape: Shape, turn: int) -> Seen | None:
            move = _move(link, self._clock.monotonic() + PROBE_S, room, data_bytes, shape, turn)
            return self._timed(strategies.mapped, move)

        [found] = self._by_turns([copy], arrays.like(room, (self._cold,)))
        return max(seen.nbytes / seen.seconds for seen in found)

    def _by_turns(self, ways: Sequence[Way], cold: Array) -> list[list[Seen]]:
        """Return the median of each strategy's turns, for every shape that there is room for."""
        found: list[list[Seen]] = [[] for _ in ways]
        for shape in self._shapes:
            turns: list[list[Seen]] = [[] for _ in ways]
            for turn in range(self._turns):
                for way, before, taken in zip(ways, found, turns, strict=True):
                    if any(seen.seconds > SLOW_S for seen in (*before, *taken)):
                        continue
                    cold[:] = turn
                    seen = way(shape, turn)
                    if seen is not None:
                        taken.append(seen)
            for before, taken in zip(found, turns, strict=True):
                if taken:
                    # The first turn also pays for one-time setup.
                    seconds = statistics.median(seen.seconds for seen in taken[1:] or taken)
                    before.append(taken[0]._replace(seconds=seconds))
        return found

    def _timed(self, strategy: Callable[[Move], object], move: Move | None) -> Seen | None:
        if move is None:
            return None
        began = self._clock.perf_counter()
        strategy(move)
        return Seen(move.segments, move.nbytes, self._clock.perf_counter() - began)


def _move(
    link: Link, deadline: float, room: Array, data_bytes: int, shape: Shape, turn: int
) -> Move | None:
    """Return a move into `room`; None: `room` or the holder's data is too small."""
    planes, rows, run = shape
    row_bytes = min(ROW_BYTES, data_bytes, len(room))
    nbytes = planes * rows * row_bytes
    if nbytes > min(data_bytes, len(room)):
        return None
    # Not at the offset of the previous turn.
    offset = turn * nbytes % (data_bytes - nbytes + 1)
    firsts = list(range(0, rows, run))
    random.Random(rows).shuffle(firsts)
    return Move(
        link=link,
        parts=(Part(offset, row_bytes, 0),),
        length=rows,
        tokens=range(rows),
        planes=range(planes),
        pool=room[:nbytes].reshape(planes, rows, row_bytes),
        runs=[(first, run) for first in firsts],
        deadline=deadline,
    )
