"""Blocks of the decode's paged KV pool: who holds which, in as few consecutive runs as possible."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.kvcache.holes import Holes


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    `runs` are (first row, rows) in the pool [layers, 2, rows, kv_heads, head_dim].
    """

    runs: tuple[tuple[int, int], ...]
    block_size: int

    @property
    def blocks(self) -> list[int]:
        """Block numbers in the order of the sequence's tokens."""
        size = self.block_size
        return [row // size for first, n in self.runs for row in range(first, first + n, size)]

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return sum(rows for _, rows in self.runs)

    def rows(self, tokens: int) -> list[tuple[int, int]]:
        """The runs cut to the sequence's first `tokens` tokens.

        Raises:
            ValueError: more tokens than the blocks hold.
        """
        if not 0 <= tokens <= self.capacity:
            raise ValueError(f"{tokens} tokens; the blocks hold 0 to {self.capacity}")
        cut = []
        for first, rows in self.runs:
            if not tokens:
                break
            cut.append((first, min(rows, tokens)))
            tokens -= cut[-1][1]
        return cut


class BlockPool:
    """Hands out `blocks` blocks of `block_size` rows; book-keeping only.

    One run is preferred, because attention then reads a view of the pool instead of gathering.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._holes = Holes(blocks)
        self._tables: set[BlockTable] = set()

    @property
    def free_blocks(self) -> int:
        return self._holes.free

    @property
    def used_blocks(self) -> int:
        return self.blocks - self._holes.free

    def allocate(self, tokens: int) -> BlockTable | None:
        """Blocks for `tokens` tokens, None if there are not enough.

        The smallest single run that fits, else as few runs as there can be, longest first.
        """
        if tokens <= 0:
            raise ValueError(f"a sequence has at least 1 token, not {tokens}")
        wanted = -(-tokens // self.block_size)
        if wanted > self._holes.free:
            return None
        runs = []
        while wanted:
            count = min(wanted, self._holes.largest)
            first = self._holes.take(count)
            assert first is not None
            runs.append((first * self.block_size, count * self.block_size))
            wanted -= count
        table = BlockTable(tuple(runs), self.block_size)
        self._tables.add(table)
        return table

    def free(self, table: BlockTable) -> None:
        """Take the blocks of a table back.

        Raises:
            ValueError: the table is not of this pool, or has been freed before.
        """
        if table not in self._tables:
            raise ValueError(f"blocks {table.blocks} are not held: freed twice, or of another pool")
        self._tables.remove(table)
        for first, rows in table.runs:
            self._holes.give(first // self.block_size, rows // self.block_size)
