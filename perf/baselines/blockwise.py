"""Baseline: a KV cache is moved block by block, with a handshake with the holder before each.

This is the transfer between two paged pools of the paper's block-fixed baseline: a block is some
tokens of one layer's K or V, or, where a pool's blocks span all layers, of all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from pdserve.transfer import arrays
from pdserve.transfer.consumer.strategies import Move, segments
from pdserve.transfer.protocol import Spans


def per_plane(move: Move, handshake: Callable[[], object]) -> int:
    """Move the runs of the move, each a block of one layer's K or V.

    Return the number of blocks.
    """
    return _one_by_one(move, segments(move), handshake)


def spanning(move: Move, block: int, handshake: Callable[[], object]) -> int:
    """Move blocks that hold all layers of `block` tokens, contiguous at both ends.

    Return their number.
    """
    nbytes = block * len(move.planes) * move.pool.shape[2]
    starts = np.arange(0, len(move.tokens) // block, dtype=np.int64) * nbytes
    spans = np.empty((len(starts), 3), np.int64)
    spans[:, 0] = move.parts[0].offset + starts
    spans[:, 1] = arrays.address(move.pool) + starts[::-1]
    spans[:, 2] = nbytes
    return _one_by_one(move, spans, handshake)


def _one_by_one(move: Move, spans: Spans, handshake: Callable[[], object]) -> int:
    data = move.link.data
    for span in spans:
        handshake()
        if isinstance(data, np.ndarray):
            source, target, nbytes = span.tolist()
            ctypes.memmove(target, data.ctypes.data + source, nbytes)
        else:
            move.link.pull(span[None], move.deadline).wait(move.alive)
    return len(spans)
