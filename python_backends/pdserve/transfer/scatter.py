"""From contiguous KV caches, or pieces of them, into the rows of a paged pool in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
from numpy.typing import NDArray

Runs = Sequence[tuple[int, int]]
"""(first row, rows) each: where consecutive tokens go."""


# Segments from this size on are copied run by run: the fewest calls. Smaller ones go plane by
# plane, since a run's place in the next plane is megabytes away and every copy a TLB miss. Against
# memcpy of 256 MiB in blocks in random order: 1.0-1.4 instead of 1.2-3.1 (2 KiB segments: 2-2.6).
LONG = 64 << 10


def scatter(source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: Runs) -> None:
    """Copy uint8 [planes, tokens, row_bytes] into runs of pool [planes, rows, row_bytes].

    `runs` have together as many rows as there are tokens; the GIL is released. numpy's copies:
    torch's index_copy_ takes 1.5 to 4 times as long here.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
    """
    check(runs, source.shape[1], pool.shape[1])
    unit = _unit(runs, pool)
    if unit == 0 or source.shape[1] * source.shape[2] >= LONG * len(runs):
        _by_run(source, pool, runs)
        return
    whole = runs[-1][1] // unit * unit
    last = source.shape[1] - runs[-1][1] + whole
    numbers = [np.arange(first // unit, (first + rows) // unit) for first, rows in runs[:-1]]
    numbers.append(np.arange(whole // unit) + runs[-1][0] // unit)
    places = np.concatenate(numbers)
    rows, row_bytes = pool.shape[1] // unit * unit, pool.shape[2]
    for to, plane in zip(pool, source, strict=True):
        blocks = to[:rows].reshape(-1, unit * row_bytes) if unit > 1 else to
        blocks[places] = plane[:last].reshape(len(places), -1)
    if last < source.shape[1]:
        _by_run(source[:, last:], pool, [(runs[-1][0] + whole, source.shape[1] - last)])


def _unit(runs: Runs, pool: NDArray[np.uint8]) -> int:
    """The largest block that all runs but the end of the last one are made of; 0: none needed.

    Rows of a pool that are only filled in part are blocks of their own.
    """
    if len(runs) == 1 and pool.strides[1] == pool.shape[2]:
        return 0
    if pool.strides[1] != pool.shape[2]:
        return 1
    return gcd(*(first for first, _ in runs), *(rows for _, rows in runs[:-1]))


def _by_run(source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: Runs) -> None:
    start = 0
    for first, rows in runs:
        np.copyto(pool[:, first : first + rows], source[:, start : start + rows])
        start += rows


def check(runs: Runs, tokens: int, limit: int) -> None:
    """Make sure that runs have `tokens` rows, of a pool of `limit`.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
    """
    for first, rows in runs:
        # A slice beyond the end would be cut short without a word.
        if first < 0 or rows < 1 or first + rows > limit:
            raise ValueError(f"run {(first, rows)} is not inside the pool's {limit} rows")
    if sum(rows for _, rows in runs) != tokens:
        raise ValueError(f"runs {list(runs)} do not have {tokens} rows")


def part_of(runs: Runs, start: int, tokens: int) -> list[tuple[int, int]]:
    """The runs of tokens `start` to `start + tokens` of those that `runs` are for."""
    cut = []
    for first, rows in runs:
        skipped = min(start, rows)
        taken = min(rows - skipped, tokens)
        if taken:
            cut.append((first + skipped, taken))
        start -= skipped
        tokens -= taken
    return cut
