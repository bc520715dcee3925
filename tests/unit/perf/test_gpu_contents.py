"""Tests that the GPU suite notices bytes that were not sent, and a holder that does not begin."""

from __future__ import annotations

import os

import numpy as np
import pytest
from perf.gpu.place import Place
from perf.gpu.scale import SMALLEST
from perf.gpu.transfer_contents import Contents, shuffled
from perf.transfer.holding import Holding

from pdserve.kvcache.layout import KVLayout
from pdserve.transfer.scatter import scatter

TOKENS, BLOCK = 32, 8
LAYOUT = KVLayout(2, 2, 16, "float32")
RUNS = shuffled(TOKENS, BLOCK)


@pytest.fixture
def contents() -> Contents:
    return Contents(Place(SMALLEST), LAYOUT, 2 * TOKENS)


def sent(contents: Contents) -> np.ndarray:
    return contents.sent[: LAYOUT.nbytes(TOKENS)]


def scattered(contents: Contents) -> None:
    scatter(sent(contents).reshape(LAYOUT.shape(TOKENS)), contents.pool, RUNS)


def test_the_runs_are_blocks_in_another_order() -> None:
    assert sorted(RUNS) == [(first, BLOCK) for first in range(0, TOKENS, BLOCK)]
    assert list(RUNS) != sorted(RUNS)


def test_what_was_sent_is_right_and_then_cleared(contents: Contents) -> None:
    scattered(contents)
    assert contents.in_pool(TOKENS, RUNS)
    assert not contents.pool.any()
    assert not contents.in_pool(TOKENS, RUNS)


def test_one_other_byte_is_wrong(contents: Contents) -> None:
    scattered(contents)
    first, rows = RUNS[-1]
    contents.pool[-1, first + rows - 1, -1] ^= 1
    assert not contents.in_pool(TOKENS, RUNS)


def test_exchanged_blocks_are_wrong(contents: Contents) -> None:
    scattered(contents)
    assert not contents.in_pool(TOKENS, sorted(RUNS))


def test_contiguous_memory_is_compared_as_it_is(contents: Contents) -> None:
    room, nbytes = np.zeros(LAYOUT.nbytes(TOKENS), np.uint8), LAYOUT.nbytes(TOKENS)
    room[:] = sent(contents)
    assert contents.arrived(room, nbytes)
    assert not contents.arrived(room, nbytes)


def test_blocks_of_all_planes_come_in_reverse(contents: Contents) -> None:
    nbytes = LAYOUT.nbytes(TOKENS)
    blocks = sent(contents).reshape(TOKENS // BLOCK, -1)
    contents.flat[:nbytes] = blocks[::-1].reshape(-1)
    assert contents.in_spans(TOKENS, BLOCK)
    contents.flat[:nbytes] = blocks.reshape(-1)
    assert not contents.in_spans(TOKENS, BLOCK)


def test_a_holder_that_does_not_begin_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="ended with 1"):
        Holding([], os.environ, "127.0.0.1", "shm", 1 << 20, "no such layout")
    assert "no such layout" in capfd.readouterr().err
