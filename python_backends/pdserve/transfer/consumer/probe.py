"""What a link can do, measured as it is made: its latency, and the cost of its moves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.consumer import strategies
from pdserve.transfer.consumer.cost_model import Seen, Strategy
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.protocol import Link

Shape = tuple[int, int, int]
"""Planes, rows, rows in a run."""
Way = Callable[[Shape, int], "Seen | None"]

PROBE_S = 2.0
"""Of each measurement at most."""
LOOKS = 5
TURNS = 5
ROW_BYTES = 1 << 10
# (planes, rows, rows in a run), the smaller first: from one row to 16 MiB, in one segment and many.
# What is small fits into caches and sockets' buffers, and tells nothing of what is large.
SHAPES = (
    *((1, 1, 1), (1, 16, 16), (1, 256, 256), (1, 256, 4)),
    *((1, 1024, 1024), (1, 1024, 64), (1, 1024, 8)),
    # Planes as large as those of long prompts: their runs lie further apart than pages' tables
    # in a cache reach, which is what a scatter then pays for.
    *((4, 4096, 4096), (4, 4096, 64), (4, 4096, 8)),
)
# A link that takes so long for one of them is slow: the larger ones would tell nothing new.
SLOW_S = 60e-3
COLD = 48 << 20
"""Bytes written before each move: more than caches have, so that what moves is in none of them."""
LARGE = 16 << 20
"""Bytes of the move that a link's rate is told by."""
ONCE = 1 << 20
"""Bytes of a move that only has to arrive: so many take another way than a look does."""


def latency(link: Link) -> float:
    """Seconds of a look at a lease slot, the median.

    Raises:
        TransferError: the holder does not answer.
    """
    looks = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        link.peek(0, time.monotonic() + PROBE_S)
        looks.append(time.perf_counter() - began)
    return statistics.median(looks)


def once(link: Link, staging: Staging, data_bytes: int) -> None:
    """Move something, to see that the link, which is not mapped, does.

    Raises:
        TransferError: it does not, or no buffer became free.
    """
    deadline = time.monotonic() + PROBE_S
    with staging.take(1, deadline) as (buffer,):
        span = 0, arrays.address(buffer), min(ONCE, staging.piece_bytes, data_bytes)
        link.pull(np.array([span], np.int64), deadline).wait()


def moves(link: Link, staging: Staging, data_bytes: int) -> dict[Strategy, list[Seen]]:
    """Moves of several shapes, of whatever the holder's data are.

    The strategies take turns, so that a slow moment of the machine counts against both.

    Raises:
        TransferError: the holder does not answer, or no buffer became free.
    """
    memory = staging.memory
    # What is scattered goes to memory of its own; what comes directly, to registered memory.
    own = arrays.like(memory, (min(LARGE, data_bytes),))

    def whole(shape: Shape, turn: int) -> Seen | None:
        move = _move(link, own, data_bytes, shape, turn)
        return _timed(lambda move: strategies.whole(move, staging), move)

    def direct(shape: Shape, turn: int) -> Seen | None:
        with staging.take(len(memory), time.monotonic() + PROBE_S) as buffers:
            alone = len(buffers) == len(memory)  # and so all of them, one after another
            room = memory.reshape(-1) if alone else buffers[0]
            move = _move(link, room, data_bytes, shape, turn)
            return _timed(strategies.direct, move)

    seen = _by_turns([whole, direct], arrays.like(memory, (COLD,)))
    return {"whole": seen[0], "direct": seen[1]}


def mapped(link: Link, staging: Staging, data_bytes: int) -> float:
    """Bytes per second of copies out of mapped memory."""
    room = arrays.like(staging.memory, (staging.memory.nbytes,))

    def copy(shape: Shape, turn: int) -> Seen | None:
        move = _move(link, room, data_bytes, shape, turn)
        return _timed(strategies.mapped, move)

    [found] = _by_turns([copy], arrays.like(room, (COLD,)))
    return max(seen.nbytes / seen.seconds for seen in found)


def _by_turns(ways: Sequence[Way], cold: Array) -> list[list[Seen]]:
    """Of every shape that there is room for, the median of its turns."""
    found: list[list[Seen]] = [[] for _ in ways]
    for shape in SHAPES:
        turns: list[list[Seen]] = [[] for _ in ways]
        for turn in range(TURNS):
            for way, before, taken in zip(ways, found, turns, strict=True):
                if any(seen.seconds > SLOW_S for seen in (*before, *taken)):
                    continue
                cold[:] = turn
                seen = way(shape, turn)
                if seen is not None:
                    taken.append(seen)
        for before, taken in zip(found, turns, strict=True):
            if taken:
                # The first also pays for what is set up once.
                seconds = statistics.median(seen.seconds for seen in taken[1:] or taken)
                before.append(taken[0]._replace(seconds=seconds))
    return found


def _timed(strategy: Callable[[Move], object], move: Move | None) -> Seen | None:
    if move is None:
        return None
    began = time.perf_counter()
    strategy(move)
    return Seen(move.segments, move.nbytes, time.perf_counter() - began)


def _move(link: Link, room: Array, data_bytes: int, shape: Shape, turn: int) -> Move | None:
    """Into `room`; None: it, or what the holder has, is too small."""
    planes, rows, run = shape
    row_bytes = min(ROW_BYTES, data_bytes, len(room))
    nbytes = planes * rows * row_bytes
    if nbytes > min(data_bytes, len(room)):
        return None
    # Not from where the last one was.
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
        deadline=time.monotonic() + PROBE_S,
    )
