"""What a link can do, measured when two instances meet: its latency, and the cost of its moves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from pdserve.transfer import arrays, strategies
from pdserve.transfer.arrays import Array
from pdserve.transfer.protocol import Link
from pdserve.transfer.staging import Staging
from pdserve.transfer.strategies import Move, Part
from pdserve.transfer.tuner import Seen, Strategy

PROBE_S = 2.0
"""Of each measurement at most."""
LOOKS = 5
TURNS = 4
ROW_BYTES = 1 << 10
# (planes, rows, rows in a run), the smaller first: from one row to 16 MiB, in one segment and many.
# What is small fits into caches and sockets' buffers, and tells nothing of what is large.
SHAPES = (
    *((1, 1, 1), (1, 16, 16), (1, 256, 256), (1, 256, 4)),
    *((1, 1024, 1024), (1, 1024, 64), (1, 1024, 8)),
    *((16, 1024, 1024), (16, 1024, 64), (16, 1024, 8)),
)
# A link that takes so long for one of them is slow: the larger ones would tell nothing new.
SLOW_S = 60e-3
LARGE = 16 << 20
"""Bytes of the move that a link's rate is told by."""


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


def moves(link: Link, staging: Staging, data_bytes: int) -> dict[Strategy, list[Seen]]:
    """Moves of several shapes, of whatever the holder's data are.

    Raises:
        TransferError: the holder does not answer, or no buffer became free.
    """
    whole = strategies.whole
    # What is scattered goes to memory of its own; what comes directly, to registered memory.
    room = arrays.like(staging.memory, (min(LARGE, data_bytes),))
    seen: dict[Strategy, list[Seen]] = {
        "whole": _moves(lambda move: whole(move, staging), link, room, data_bytes)
    }
    with staging.take(len(staging.memory), time.monotonic() + PROBE_S) as buffers:
        alone = len(buffers) == len(staging.memory)  # and so all of them, one after another
        room = staging.memory.reshape(-1) if alone else buffers[0]
        seen["direct"] = _moves(strategies.direct, link, room, data_bytes)
    return seen


def _moves(
    strategy: Callable[[Move], object], link: Link, room: Array, data_bytes: int
) -> list[Seen]:
    row_bytes = min(ROW_BYTES, data_bytes, len(room))
    found: list[Seen] = []
    for planes, rows, run in SHAPES:
        nbytes = planes * rows * row_bytes
        if nbytes > min(data_bytes, len(room)) or (found and found[-1].seconds > SLOW_S):
            break
        pool = room[:nbytes].reshape(planes, rows, row_bytes)
        taken = []
        for turn in range(TURNS):
            # Not from where the last one was: it may still be in a cache.
            offset = turn * nbytes % (data_bytes - nbytes + 1)
            move = _move(link, pool, run, offset)
            began = time.perf_counter()
            strategy(move)
            taken.append(time.perf_counter() - began)
            if taken[-1] > SLOW_S:
                break
        # The first also pays for what is set up once.
        found.append(Seen(move.segments, nbytes, statistics.median(taken[1:] or taken)))
    return found


def mapped(link: Link, staging: Staging, data_bytes: int) -> float:
    """Bytes per second of copies out of mapped memory."""
    room = staging.memory.reshape(-1)
    found = _moves(strategies.mapped, link, arrays.like(room, room.shape), data_bytes)
    return max(seen.nbytes / seen.seconds for seen in found)


def _move(link: Link, pool: Array, run: int, offset: int) -> Move:
    planes, rows, row_bytes = pool.shape
    firsts = list(range(0, rows, run))
    random.Random(rows).shuffle(firsts)
    return Move(
        link=link,
        parts=(Part(offset, row_bytes, 0),),
        length=rows,
        tokens=range(rows),
        planes=range(planes),
        pool=pool,
        runs=[(first, run) for first in firsts],
        deadline=time.monotonic() + PROBE_S,
    )
