"""Scatter of contiguous KV caches, or pieces of them, into a paged pool in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Runs: TypeAlias = Sequence[tuple[int, int]] | NDArray[np.int64]
"""Runs of (first row, rows) for consecutive tokens. Thousands of them are an array, [n, 2]."""

# Segments from this size on are copied run by run: the fewest calls. Smaller ones go plane by
# plane, since a run's place in the next plane is megabytes away and every copy a TLB miss. Against
# memcpy of 256 MiB in blocks in random order: 1.0-1.4 instead of 1.2-3.1 (2 KiB segments: 2-2.6).
LONG = 64 << 10


def scatter(source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: Runs) -> None:
    """Copy uint8 [planes, tokens, row_bytes] into runs of pool [planes, rows, row_bytes].

    `runs` have together as many rows as there are tokens; the GIL is released. It uses numpy's
    copies: torch's index_copy_ takes 1.5 to 4 times as long here.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
    """
    runs = checked(runs, source.shape[1], pool.shape[1])
    unit = _unit(runs, pool)
    if unit == 0 or source.shape[1] * source.shape[2] >= LONG * len(runs):
        _by_run(source, pool, runs)
        return
    firsts, counts = runs.T // unit
    places = each(firsts, counts)
    last = len(places) * unit
    rows, row_bytes = pool.shape[1] // unit * unit, pool.shape[2]
    for to, plane in zip(pool, source, strict=True):
        blocks = to[:rows].reshape(-1, unit * row_bytes) if unit > 1 else to
        blocks[places] = plane[:last].reshape(len(places), -1)
    if last < source.shape[1]:
        left = source.shape[1] - last
        _by_run(source[:, last:], pool, [(runs[-1].sum() - left, left)])


def _unit(runs: NDArray[np.int64], pool: NDArray[np.uint8]) -> int:
    """Return the largest block of which all runs but the end of the last one consist.

    0: none needed.

    Rows of a pool that are filled only in part are separate blocks.
    """
    if len(runs) == 1 and pool.strides[1] == pool.shape[2]:
        return 0
    if pool.strides[1] != pool.shape[2]:
        return 1
    return int(np.gcd.reduce(runs.ravel()[:-1]))


def _by_run(source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: Runs) -> None:
    start = 0
    for first, rows in runs:
        np.copyto(pool[:, first : first + rows], source[:, start : start + rows])
        start += rows


def checked(runs: Runs, tokens: int, limit: int) -> NDArray[np.int64]:
    """Check runs, and return them as an array: [n, 2].

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
    """
    array = _array(runs)
    firsts, rows = array.T
    # A slice beyond the end would be cut short silently.
    outside = (firsts < 0) | (rows < 1) | (firsts + rows > limit)
    if outside.any():
        worst = int(outside.argmax())
        run = int(firsts[worst]), int(rows[worst])
        raise ValueError(f"run {run} is not inside the pool's {limit} rows")
    if rows.sum() != tokens:
        raise ValueError(f"runs of {rows.sum()} rows do not have {tokens} rows")
    return array


def _array(runs: Runs) -> NDArray[np.int64]:
    return np.asarray(runs, np.int64).reshape(-1, 2)


def each(firsts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of all runs, one run after another: int64 [sum of the counts]."""
    starts = np.cumsum(counts) - counts
    numbers: NDArray[np.int64] = np.repeat(firsts - starts, counts)
    return numbers + np.arange(len(numbers))


def part_of(runs: Runs, start: int, tokens: int) -> NDArray[np.int64]:
    """Return the runs of tokens `start` to `start + tokens`, as far as `runs` have rows: [n, 2]."""
    array = _array(runs)
    ends = np.cumsum(array[:, 1])
    # Searched, not filtered: every piece of a KV cache looks in thousands of runs.
    begin = np.searchsorted(ends, start, "right")
    part = array[begin : np.searchsorted(ends, start + tokens) + 1].copy() if tokens else array[:0]
    if len(part):
        skipped = start - (ends[begin] - part[0, 1])
        part[0] += skipped, -skipped
        part[-1, 1] -= max(part[:, 1].sum() - tokens, 0)
    return part
