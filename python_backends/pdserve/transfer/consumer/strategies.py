"""Strategies of moving a KV cache, or parts of it, over a link and into a pool.

    mapped   the holder's memory is this process's too: one scatter from there
    whole    contiguous pieces into the staging buffers, each scattered while the next arrives
    direct   one transfer straight into the pool's rows, a descriptor for every segment

*Layered* is any of the three, applied to the planes that have become ready while others are still
being computed. A *segment* is contiguous at both ends: a run of one plane, or a row of it where a
part does not fill the pool's rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.protocol import Link, Pending, Spans
from pdserve.transfer.scatter import Runs, each, part_of

# Between two pieces, of some 30 ms, the receiver can show that it is alive.
MAPPED_PIECE = 256 << 20
# Pieces in progress at the same time: one arrives while the other is scattered.
DEPTH = 2
# Tokens: a multiple of all usual block sizes. A piece that begins within a block is scattered row
# by row; one of blocks that are larger, run by run.
WHOLE_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """Some heads of a KV cache: uint8 [planes, tokens, row_bytes] at `offset` of the data."""

    offset: int
    row_bytes: int
    column: int
    """Offset of its bytes in a row of the pool."""


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of a KV cache, or a part of it, over a link into a pool."""

    link: Link
    parts: tuple[Part, ...]
    length: int
    """Number of tokens of the KV cache at its holder."""
    tokens: range
    """Tokens to copy."""
    planes: range
    pool: Array
    """The pool, [planes, rows, row_bytes]."""
    runs: Runs
    """Runs of the pool for the tokens to copy."""
    deadline: float
    """Seconds on CLOCK_MONOTONIC."""
    alive: Callable[[], None] = lambda: None
    """Called repeatedly while waiting for bytes."""

    @property
    def nbytes(self) -> int:
        return len(self.planes) * len(self.tokens) * sum(part.row_bytes for part in self.parts)

    @property
    def segments(self) -> int:
        each = len(self.runs) if self.fills_rows else len(self.tokens)
        return len(self.parts) * len(self.planes) * each

    @property
    def fills_rows(self) -> bool:
        """Tell whether the pool's rows are filled whole, so that runs of them are contiguous."""
        return all(part.row_bytes == self.pool.shape[2] for part in self.parts)

    def of(self, planes: range) -> Move:
        """Return the same move for some of the planes."""
        return replace(self, planes=planes)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some planes with all wanted tokens, or some tokens of one plane."""

    part: Part
    planes: range
    tokens: range

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.planes), len(self.tokens), self.part.row_bytes

    @property
    def nbytes(self) -> int:
        planes, tokens, row_bytes = self.shape
        return planes * tokens * row_bytes

    def spans(self, length: int, address: int) -> Spans:
        """Return where it lies at the holder; it arrives contiguously at `address`."""
        planes, tokens, row_bytes = self.shape
        # Planes with all of their tokens are adjacent: one span.
        spans = 1 if tokens == length else planes
        span_bytes = self.nbytes // spans
        number = np.arange(spans, dtype=np.int64)
        made = np.empty((spans, 3), np.int64)
        row = (self.planes.start + number) * length + self.tokens.start
        made[:, 0] = self.part.offset + row * row_bytes
        made[:, 1] = address + number * span_bytes
        made[:, 2] = span_bytes
        return made

    def scatter(self, source: Array, move: Move) -> None:
        columns = slice(self.part.column, self.part.column + self.part.row_bytes)
        pool = move.pool[self.planes.start : self.planes.stop, :, columns]
        arrays.scatter(
            source,
            pool,
            part_of(move.runs, self.tokens.start - move.tokens.start, len(self.tokens)),
        )


def _pieces(move: Move, limit: int) -> Iterator[_Piece]:
    """Split the move into pieces of at most `limit` bytes, or of one row."""
    for part in move.parts:
        plane_bytes = len(move.tokens) * part.row_bytes
        if plane_bytes <= limit:
            step = limit // plane_bytes
            for first in range(move.planes.start, move.planes.stop, step):
                planes = range(first, min(first + step, move.planes.stop))
                yield _Piece(part, planes, move.tokens)
            continue
        step = max(limit // part.row_bytes, 1)
        step -= step % WHOLE_BLOCKS if step > WHOLE_BLOCKS else 0
        for plane in move.planes:
            for first in range(move.tokens.start, move.tokens.stop, step):
                tokens = range(first, min(first + step, move.tokens.stop))
                yield _Piece(part, range(plane, plane + 1), tokens)


def mapped(move: Move) -> None:
    """Copy once, out of the holder's memory into the pool's rows.

    Raises:
        TransferError: the holder's device does not finish what is reported as filled.
    """
    assert move.link.data is not None
    move.link.ready(move.deadline)
    data = arrays.seen(move.link.data)
    planes = len(move.pool)
    for piece in _pieces(move, MAPPED_PIECE):
        start, row_bytes = piece.part.offset, piece.part.row_bytes
        cache = data[start : start + planes * move.length * row_bytes]
        cache = cache.reshape(planes, move.length, row_bytes)
        rows = slice(piece.tokens.start, piece.tokens.stop)
        piece.scatter(cache[piece.planes.start : piece.planes.stop, rows], move)
        move.alive()


def whole(move: Move, staging: Staging) -> None:
    """Pull into staging buffers and scatter from there, piece by piece.

    Raises:
        TransferError: the link failed; see `Pending.wait`.
    """
    with staging.take(DEPTH, move.deadline, move.alive) as buffers:
        arriving: deque[tuple[_Piece, Array, Pending]] = deque()
        try:
            for number, piece in enumerate(_pieces(move, staging.piece_bytes)):
                if len(arriving) == len(buffers):
                    _land(move, *arriving.popleft())
                buffer = buffers[number % len(buffers)]
                spans = piece.spans(move.length, arrays.address(buffer))
                arriving.append((piece, buffer, move.link.pull(spans, move.deadline)))
            while arriving:
                _land(move, *arriving.popleft())
        except BaseException:
            # Nobody else may get a buffer in which bytes still arrive.
            move.link.close()
            raise


def _land(move: Move, piece: _Piece, buffer: Array, pending: Pending) -> None:
    pending.wait(move.alive)
    piece.scatter(buffer[: piece.nbytes].reshape(piece.shape), move)
    move.alive()


def direct(move: Move) -> None:
    """Pull every segment to its place in the pool.

    Raises:
        TransferError: the link failed; see `Pending.wait`.
    """
    move.link.pull(segments(move), move.deadline).wait(move.alive)


def segments(move: Move) -> Spans:
    """Return the move as one transfer: int64 [segments, 3]."""
    plane_bytes, row_bytes = arrays.strides(move.pool)[:2]
    starts, rows, firsts = _along_tokens(move)
    planes = np.arange(move.planes.start, move.planes.stop)[:, None]
    spans = []
    for part in move.parts:
        span = np.empty((len(move.planes), len(starts), 3), np.int64)
        span[..., 0] = part.offset + (planes * move.length + starts) * part.row_bytes
        span[..., 1] = planes * plane_bytes + firsts * row_bytes + part.column
        span[..., 1] += arrays.address(move.pool)
        span[..., 2] = rows * part.row_bytes
        spans.append(span.reshape(-1, 3))
    return np.concatenate(spans)


def _along_tokens(move: Move) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return first token, tokens and first pool row of every segment of a plane: int64 [n] each."""
    firsts, rows = np.array(move.runs, np.int64).T
    if move.fills_rows:
        return move.tokens.start + np.cumsum(rows) - rows, rows, firsts
    alone = np.ones(len(move.tokens), np.int64)
    return np.arange(move.tokens.start, move.tokens.stop), alone, each(firsts, rows)
