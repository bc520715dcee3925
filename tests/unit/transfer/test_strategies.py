"""Tests that each strategy copies the same bytes from a holder into the rows of a pool."""

from __future__ import annotations

import itertools
import time
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.errors import HandleError
from pdserve.kvcache.handle import unseal
from pdserve.kvcache.layout import KVLayout
from pdserve.transfer import scatter as scattering
from pdserve.transfer.consumer import strategies
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.endpoint import Endpoint
from pdserve.transfer.protocol import Memory, TransferError
from pdserve.transfer.scatter import part_of, scatter
from tests.unit.memcpy import MemcpyLink
from tests.unit.transfers import KEY, Sender, pick, transport

LAYOUT = KVLayout(3, 2, 8, "float32")
LATER = 10.0
"""The deadline of a move, in seconds."""


@st.composite
def runs_of(draw: st.DrawFn, tokens: int) -> list[tuple[int, int]]:
    """Generate disjoint runs of `tokens` rows, in any order, with or without gaps."""
    block = draw(st.sampled_from([1, 1, 4]))
    left, sizes = tokens, []
    while left:
        sizes.append(min(draw(st.integers(1, 12)) * block, left))
        left -= sizes[-1]
    end, runs = 0, []
    for rows in draw(st.permutations(sizes)) if block == 1 else sizes:
        first = end + draw(st.integers(0, 3)) * block
        end = first + -(-rows // block) * block
        runs.append((first, rows))
    if block == 1:
        return draw(st.permutations(runs))
    # As in block tables: only the last run may end within a block.
    return [*draw(st.permutations(runs[:-1])), runs[-1]]


@st.composite
def moves(draw: st.DrawFn) -> tuple[Move, NDArray[np.uint8]]:
    """Generate a move whose pool holds random bytes, and the pool as it must be afterwards."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    heads = draw(st.sampled_from([1, 2, 4]))
    cut = draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads]))
    row_bytes = heads * draw(st.integers(1, 9))
    planes, length = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    part_bytes = row_bytes // cut
    parts, caches, offset = [], [], 0
    for number in draw(st.permutations(range(cut))):
        offset += draw(st.integers(0, 20))
        parts.append(Part(offset, part_bytes, number * part_bytes))
        caches.append(rng.integers(0, 256, (planes, length, part_bytes), np.uint8))
        offset += caches[-1].nbytes
    data = rng.integers(0, 256, offset + draw(st.integers(0, 20)), np.uint8)
    for part, cache in zip(parts, caches, strict=True):
        data[part.offset : part.offset + cache.nbytes] = cache.ravel()
    first = draw(st.integers(0, length - 1))
    wanted = range(first, draw(st.integers(first + 1, length)))
    low = draw(st.integers(0, planes - 1))
    some = range(low, draw(st.integers(low + 1, planes)))
    runs = draw(runs_of(len(wanted)))
    rows = max(start + count for start, count in runs) + draw(st.integers(0, 3))
    pool = rng.integers(0, 256, (planes, rows, row_bytes), np.uint8)
    expected = pool.copy()
    places = [row for start, count in runs for row in range(start, start + count)]
    for part, cache in zip(parts, caches, strict=True):
        for plane in some:
            columns = slice(part.column, part.column + part_bytes)
            expected[plane, places, columns] = cache[plane, wanted.start : wanted.stop]
    link = MemcpyLink(None, data)
    deadline = time.monotonic() + LATER
    move = Move(link, tuple(parts), length, wanted, some, pool, runs, deadline)
    return move, expected


def moved_bytes(move: Move) -> int:
    assert isinstance(move.link, MemcpyLink)
    return int(sum(spans[:, 2].sum() for spans in move.link.pulls))


@settings(max_examples=200)
@given(moves(), st.integers(1, 3), st.integers(1, 300))
def test_whole(made: tuple[Move, NDArray[np.uint8]], buffers: int, piece_bytes: int) -> None:
    move, expected = made
    piece_bytes = max(piece_bytes, *(part.row_bytes for part in move.parts))
    staging = Staging(np.ones((buffers, piece_bytes), np.uint8))
    move.link.memories = [Memory.of(staging.memory)]  # type: ignore[attr-defined]
    strategies.whole(move, staging)
    assert (move.pool == expected).all()
    assert moved_bytes(move) == move.nbytes
    assert staging.free == staging.memory.nbytes


@pytest.mark.parametrize("block", [8, 16, 64, 128, 256])
def test_no_piece_begins_within_a_block(block: int) -> None:
    """A plane is several pieces, whose size no block divides."""
    rng = np.random.default_rng(block)
    link = MemcpyLink(None, rng.integers(0, 256, 2 * 1800 * 64, np.uint8))
    firsts = rng.permutation(np.arange(0, 2048, block))[: -(-1500 // block)]
    runs = [(int(first), block) for first in firsts[:-1]]
    runs.append((int(firsts[-1]), 1500 - block * len(runs)))
    pool = np.zeros((2, 2048, 64), np.uint8)
    parts, tokens = (Part(0, 64, 0),), range(300, 1800)
    move = Move(link, parts, 1800, tokens, range(2), pool, runs, time.monotonic() + LATER)
    scattered: list[NDArray[np.int64]] = []

    def watched(source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: scattering.Runs) -> None:
        scattered.append(np.asarray(runs))
        scatter(source, pool, runs)

    with patch.object(scattering, "scatter", watched):
        strategies.whole(move, Staging(np.ones((2, 700 * 64), np.uint8)))
    assert [runs[:, 1].sum() for runs in scattered] == [512, 512, 476] * 2
    assert all((runs[:, 0] % block == 0).all() for runs in scattered)
    rows = [row for first, count in runs for row in range(first, first + count)]
    assert (pool[:, rows] == link.source.reshape(2, 1800, 64)[:, 300:]).all()


@settings(max_examples=200)
@given(moves())
def test_direct(made: tuple[Move, NDArray[np.uint8]]) -> None:
    move, expected = made
    move.link.memories = [Memory.of(move.pool)]  # type: ignore[attr-defined]
    strategies.direct(move)
    assert (move.pool == expected).all()
    [spans] = move.link.pulls  # type: ignore[attr-defined]
    assert len(spans) == move.segments
    assert moved_bytes(move) == move.nbytes


@settings(max_examples=200)
@given(moves(), st.integers(1, 300))
def test_mapped(made: tuple[Move, NDArray[np.uint8]], piece_bytes: int) -> None:
    move, expected = made
    move.link.data = move.link.source  # type: ignore[attr-defined]
    with patch.object(strategies, "MAPPED_PIECE", piece_bytes):
        strategies.mapped(move)
    assert (move.pool == expected).all()


@given(moves(), st.data())
def test_some_planes_after_the_others(
    made: tuple[Move, NDArray[np.uint8]], data: st.DataObject
) -> None:
    """The *layered* strategy does this."""
    move, expected = made
    ends = [move.planes.start, move.planes.stop]
    ends += data.draw(st.lists(st.integers(*ends), max_size=3))
    ends.sort()
    for start, stop in itertools.pairwise(ends):
        if start < stop:
            strategies.direct(move.of(range(start, stop)))
    assert (move.pool == expected).all()


@pytest.mark.parametrize("way", ["nixl", "nixl over tcp"])
def test_over_nixl(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links are real: pieces smaller than a plane, a tail, and rows that are filled in part."""
    name = pick(way, monkeypatch)
    sender, receiver = Sender(name), transport(name)
    data, rng = sender.holder.data, np.random.default_rng(0)
    data[:] = rng.integers(0, 256, len(data), np.uint8)
    staging, pool = Staging(np.ones((2, 1 << 10), np.uint8)), np.empty((6, 300, 64), np.uint8)
    for array in (staging.memory, pool):
        receiver.register(Memory.of(array))
    link = receiver.open(unseal(sender.holder.endpoint, Endpoint, KEY).ways[name])
    runs, rows = [(150, 60), (10, 13)], np.r_[150:210, 10:23]
    for parts in ((Part(4096, 64, 0),), (Part(4096, 32, 32), Part(65536, 32, 0))):
        for strategy in ("whole", "direct"):
            pool[:] = rng.integers(0, 256, pool.shape, np.uint8)
            expected = pool.copy()
            for part in parts:
                cache = data[part.offset : part.offset + 6 * 100 * part.row_bytes]
                columns = slice(part.column, part.column + part.row_bytes)
                expected[1:5, rows, columns] = cache.reshape(6, 100, -1)[1:5, 27:]
            deadline = time.monotonic() + LATER
            move = Move(link, parts, 100, range(27, 100), range(1, 5), pool, runs, deadline)
            if strategy == "whole":
                strategies.whole(move, staging)
            else:
                strategies.direct(move)
            assert (pool == expected).all()
    link.close()
    receiver.close()
    sender.close()


# ----------------------------------------------------------------------------------------- failures


def plain(link: MemcpyLink, alive: object = None) -> Move:
    """Return a move of many pieces."""
    pool = np.zeros((6, 50, 64), np.uint8)
    move = Move(
        link=link,
        parts=(Part(0, 64, 0),),
        length=50,
        tokens=range(50),
        planes=range(6),
        pool=pool,
        runs=[(0, 50)],
        deadline=time.monotonic() + LATER,
    )
    return move if alive is None else replace(move, alive=alive)  # type: ignore[arg-type]


def source() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, 6 * 50 * 64, np.uint8)


@pytest.mark.parametrize("at", range(7))
def test_a_link_that_fails_gives_the_buffers_back(at: int) -> None:
    """The link is closed first, so nothing arrives in the buffers any more."""
    link, staging = MemcpyLink(None, source()), Staging(np.ones((3, 50 * 64), np.uint8))

    def fail(number: int) -> None:
        if number == at:
            raise TransferError("cable cut")

    link.before = fail
    if at < 6:  # the pieces
        with pytest.raises(TransferError, match="cable cut"):
            strategies.whole(plain(link), staging)
    else:
        strategies.whole(plain(link), staging)
    assert link.closed == (at < 6)
    assert staging.free == staging.memory.nbytes


def test_a_receiver_that_gives_up_closes_the_link() -> None:
    link, staging = MemcpyLink(None, source()), Staging(np.ones((2, 50 * 64), np.uint8))

    def ended() -> None:
        if link.spans == 3:
            raise HandleError("lease 0 has ended")

    for move in (strategies.direct, lambda move: strategies.whole(move, staging)):
        link.closed, link.spans = False, 0
        with pytest.raises(HandleError, match="lease 0 has ended"):
            move(plain(link, ended))
        assert link.closed
    assert staging.free == staging.memory.nbytes


def test_nothing_is_taken_while_no_staging_is_free() -> None:
    """The wait is bounded by the deadline of the pull."""
    link, staging = MemcpyLink(None, source()), Staging(np.ones((2, 50 * 64), np.uint8))
    began = time.monotonic()
    with (
        staging.take(2, began + LATER),
        pytest.raises(TransferError, match="no staging buffer became free in time"),
    ):
        strategies.whole(replace(plain(link), deadline=began + 0.1), staging)
    assert 0.1 <= time.monotonic() - began < 1
    assert not link.pulls
    strategies.whole(plain(link), staging)
    assert len(link.pulls) == 6


def test_one_buffer_is_enough() -> None:
    """With one buffer it waits for each piece before the next; with two, it does not."""
    for taken in (1, 0):
        link, staging = MemcpyLink(None, source()), Staging(np.ones((2, 50 * 64), np.uint8))
        asked: list[int] = []
        link.before = lambda number, link=link, asked=asked: asked.append(len(link.pulls))
        with staging.take(taken, time.monotonic() + LATER) if taken else nullcontext():
            move = plain(link)
            strategies.whole(move, staging)
        assert (move.pool.ravel() == link.source).all()
        assert asked == ([1, 2, 3, 4, 5, 6] if taken else [2, 3, 4, 5, 6, 6])


def test_life_is_shown_between_pieces() -> None:
    shown: list[int] = []
    for strategy in ("whole", "mapped"):
        link = MemcpyLink(None, source())
        if strategy == "mapped":
            link.data = link.source  # type: ignore[assignment]
        move = plain(link, lambda: shown.append(1))
        with patch.object(strategies, "MAPPED_PIECE", 50 * 64):
            if strategy == "mapped":
                strategies.mapped(move)
            else:
                strategies.whole(move, Staging(np.ones((2, 50 * 64), np.uint8)))
        assert len(shown) >= 6, strategy
        shown.clear()


# --------------------------------------------------------------------------------------- scattering


@pytest.mark.parametrize("long", [1, scattering.LONG])
@given(st.data(), st.integers(1, 60), st.integers(1, 4), st.integers(1, 9))
def test_scatter_fills_the_runs_in_order_and_nothing_else(
    long: int, data: st.DataObject, tokens: int, planes: int, row_bytes: int
) -> None:
    runs = data.draw(runs_of(tokens))
    end = max(first + rows for first, rows in runs) + data.draw(st.integers(0, 3))
    column, width = data.draw(st.integers(0, 3)), row_bytes + data.draw(st.integers(3, 5))
    rng = np.random.default_rng(tokens)
    source = rng.integers(1, 256, (planes, tokens, row_bytes), np.uint8)
    rows = [row for first, count in runs for row in range(first, first + count)]
    narrow = np.zeros((planes, end, row_bytes), np.uint8)
    wide = np.zeros((planes, end, width), np.uint8)
    with patch.object(scattering, "LONG", long):
        scatter(source, narrow, runs)
        scatter(source, wide[..., column : column + row_bytes], runs)
    assert (narrow[:, rows] == source).all()
    assert not np.delete(narrow, rows, axis=1).any()
    assert (wide[..., column : column + row_bytes] == narrow).all()
    assert not np.delete(wide, np.r_[column : column + row_bytes], axis=2).any()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 3)], "do not have 4 rows"),
        ([(0, 5)], "do not have 4 rows"),
        ([(5, 4)], "not inside the pool's 8 rows"),
        ([(0, 3), (8, 1)], "not inside"),
        ([(-1, 4)], "not inside"),
        ([(0, 5), (6, -1)], "not inside"),
    ],
)
def test_scatter_refuses_runs_that_do_not_fit(runs: list[tuple[int, int]], message: str) -> None:
    source = np.zeros(LAYOUT.shape(4), np.uint8)
    with pytest.raises(ValueError, match=message):
        scatter(source, np.zeros(LAYOUT.shape(8), np.uint8), runs)


@given(st.data(), st.integers(1, 60))
def test_part_of_runs_is_a_slice_of_their_rows(data: st.DataObject, tokens: int) -> None:
    runs = data.draw(runs_of(tokens))
    start = data.draw(st.integers(0, tokens))
    count = data.draw(st.integers(0, tokens - start + 5), "perhaps more than there are")

    def rows(of: list[tuple[int, int]]) -> list[int]:
        return [row for first, number in of for row in range(first, first + number)]

    found = part_of(runs, start, count)
    assert rows(found) == rows(runs)[start : start + count]
    assert all(number > 0 for _, number in found)
