"""A decode's blocks: reserved for a sequence, kept after it for prompts that begin alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.kvcache.block_pool import BlockPool, BlockTable, copies
from pdserve.kvcache.prefix_index import PrefixIndex

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class ReservedBlocks:
    """One sequence's blocks."""

    table: BlockTable
    salt: str | None
    """None: what is computed here is not for others."""
    source: BlockTable | None = None
    """Holds the first `held` tokens already; pinned until `arrived` or `free`."""
    held: int = 0
    """Tokens that need not be pulled; at least one is."""

    def copies(self) -> list[tuple[int, int, int]]:
        """What brings the held tokens into the table: (source row, target row, rows)."""
        return copies(self.source, self.table, self.held) if self.source else []


class BlockManager:
    """Book-keeping only; who copies and pulls is somebody else."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self._index = PrefixIndex[BlockTable]()
        self.pool = BlockPool(blocks, block_size, self._index.remove)

    def reserve(self, prompt: Tokens, length: int, salt: str | None) -> ReservedBlocks | None:
        """Room for `length` tokens that begin with `prompt`; None if there is none now.

        A `salt` (tenant) shares prefixes with itself only.
        """
        found = None if salt is None else self._index.find(prompt, salt)
        if found is not None:
            source, held = found
            self.pool.pin(source)
            table = self.pool.allocate(length)
            if table is not None:
                return ReservedBlocks(table, salt, source, held)
            # Its own prefix may be what is in the way.
            self.pool.unpin(source)
        table = self.pool.allocate(length)
        return ReservedBlocks(table, salt) if table is not None else None

    def arrived(self, reserved: ReservedBlocks, prompt: Tokens) -> None:
        """The prompt's K and V are in the blocks."""
        self._unpin(reserved)
        self._add(reserved, prompt)

    def park(self, reserved: ReservedBlocks, tokens: Tokens) -> None:
        """The sequence has ended; the blocks hold the K and V of `tokens`."""
        self._add(reserved, tokens)
        self.pool.park(reserved.table, len(tokens))

    def free(self, reserved: ReservedBlocks) -> None:
        """The prompt has not arrived, and will not."""
        self._unpin(reserved)
        self.pool.free(reserved.table)

    def _unpin(self, reserved: ReservedBlocks) -> None:
        if reserved.source is not None:
            self.pool.unpin(reserved.source)
            reserved.source = None

    def _add(self, reserved: ReservedBlocks, tokens: Tokens) -> None:
        if reserved.salt is not None:
            self._index.add(reserved.table, tokens, reserved.salt)
