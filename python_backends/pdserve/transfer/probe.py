"""What a link can do, measured when two instances meet: its latency, and the cost of its moves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from pdserve.transfer import strategies
from pdserve.transfer.arrays import Array
from pdserve.transfer.protocol import Link
from pdserve.transfer.staging import Staging
from pdserve.transfer.strategies import Move, Part
from pdserve.transfer.tuner import Seen, Strategy

PROBE_S = 2.0
"""Of each measurement at most."""
LOOKS = 5
REPEATS = 3
ROW_BYTES = 1 << 10
# (rows, rows in a run), the smaller first: from one row to a MiB at once, and in many segments.
SHAPES = ((1, 1), (16, 16), (256, 256), (256, 4), (1024, 1024), (1024, 64), (1024, 8))
# A link that takes so long for one of them is slow: the larger ones would tell nothing new.
SLOW_S = 20e-3
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
    """Moves of several shapes from the holder's first bytes, whatever they are, to a buffer.

    Raises:
        TransferError: the holder does not answer, or no buffer became free.
    """
    seen: dict[Strategy, list[Seen]] = {"whole": [], "direct": []}
    row_bytes = min(ROW_BYTES, data_bytes)
    with staging.take(1, time.monotonic() + PROBE_S) as (buffer,):
        limit = min(data_bytes, buffer.nbytes) // row_bytes
        for rows, run in SHAPES:
            if rows > limit:
                break
            move = _move(link, buffer, rows, run, row_bytes)
            whole = _seconds(partial(strategies.whole, move, staging))
            direct = _seconds(partial(strategies.direct, move))
            seen["whole"].append(Seen(move.segments, move.nbytes, whole))
            seen["direct"].append(Seen(move.segments, move.nbytes, direct))
            if max(whole, direct) > SLOW_S:
                break
    return seen


def mapped(link: Link, staging: Staging, data_bytes: int) -> float:
    """Bytes per second of a copy out of mapped memory."""
    row_bytes = min(ROW_BYTES, data_bytes)
    with staging.take(1, time.monotonic() + PROBE_S) as (buffer,):
        rows = min(data_bytes, buffer.nbytes) // row_bytes
        move = _move(link, buffer, rows, rows, row_bytes)
        return move.nbytes / _seconds(partial(strategies.mapped, move))


def _move(link: Link, buffer: Array, rows: int, run: int, row_bytes: int) -> Move:
    firsts = list(range(0, rows, run))
    random.Random(rows).shuffle(firsts)
    return Move(
        link=link,
        parts=(Part(0, row_bytes, 0),),
        length=rows,
        tokens=range(rows),
        planes=range(1),
        pool=buffer[: rows * row_bytes].reshape(1, rows, row_bytes),
        runs=[(first, run) for first in firsts],
        deadline=time.monotonic() + PROBE_S,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of the quickest of a few: the first also pays for what is set up once."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
        if taken[-1] > SLOW_S:
            break
    return min(taken)
