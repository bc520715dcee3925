"""A decode's blocks: reserved for a sequence, then kept for prompts with the same prefix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.kvcache.block_pool import BlockPool, BlockTable, copies
from pdserve.kvcache.prefix_index import PrefixIndex

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class ReservedBlocks:
    """The blocks of one sequence."""

    table: BlockTable
    salt: str | None
    """Tenant whose prompts may share the prefix; None: no other prompt may."""
    source: BlockTable | None = None
    """Table that holds the first `held` tokens already; pinned until `arrived` or `free`."""
    held: int = 0
    """Number of tokens that need not be pulled; at least one token is pulled."""

    def copies(self) -> list[tuple[int, int, int]]:
        """Return the copies of the held tokens into the table: (source row, target row, rows)."""
        return copies(self.source, self.table, self.held) if self.source else []


class BlockManager:
    """Reserves the blocks of a decode's pool. Book-keeping only: others copy and pull."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self._index = PrefixIndex[BlockTable]()
        self.pool = BlockPool(blocks, block_size, self._index.remove)

    def reserve(self, prompt: Tokens, length: int, salt: str | None) -> ReservedBlocks | None:
        """Reserve room for `length` tokens that begin with `prompt`; None if there is none now.

        Prefixes are shared only between prompts of the same `salt`.
        """
        found = None if salt is None else self._index.find(prompt, salt)
        if found is not None:
            source, held = found
            self.pool.pin(source)
            table = self.pool.allocate(length)
            if table is not None:
                return ReservedBlocks(table, salt, source, held)
            # Its own prefix may occupy the room that it needs.
            self.pool.unpin(source)
        table = self.pool.allocate(length)
        return ReservedBlocks(table, salt) if table is not None else None

    def arrived(self, reserved: ReservedBlocks, prompt: Tokens) -> None:
        """Note that the prompt's K and V are in the blocks."""
        self._unpin(reserved)
        self._add(reserved, prompt)

    def park(self, reserved: ReservedBlocks, tokens: Tokens) -> None:
        """Note that the sequence has ended; the blocks hold the K and V of `tokens`."""
        self._add(reserved, tokens)
        self.pool.park(reserved.table, len(tokens))

    def free(self, reserved: ReservedBlocks) -> None:
        """Free the blocks of a prompt that has not arrived, and will not."""
        self._unpin(reserved)
        self.pool.free(reserved.table)

    def _unpin(self, reserved: ReservedBlocks) -> None:
        if reserved.source is not None:
            self.pool.unpin(reserved.source)
            reserved.source = None

    def _add(self, reserved: ReservedBlocks, tokens: Tokens) -> None:
        if reserved.salt is not None:
            self._index.add(reserved.table, tokens, reserved.salt)
