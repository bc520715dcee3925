"""A KV cache in its range, accessible as one array however it is sharded."""

from __future__ import annotations

from functools import cached_property

from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding, columns
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array


class KVRange:
    """The KV cache of `tokens` tokens in `data` uint8 [sharding.nbytes(layout, tokens)]."""

    def __init__(self, data: Array, layout: KVLayout, sharding: Sharding, tokens: int) -> None:
        self._parts = data.reshape((sharding.parts, layout.planes, tokens, -1))
        self._published = 0
        self._data = data
        self._layout = layout
        self._sharding = sharding

    @cached_property
    def whole(self) -> Array:
        """Return uint8 [planes, tokens, row_bytes]: the range itself, if it has one part.

        If the ranks' heads are stored separately, it is private memory that `publish` copies from.
        An engine whose ranks are separate devices does not need it; on a CPU one process acts for
        all ranks.
        """
        if len(self._parts) == 1:
            return self._parts[0]
        return arrays.like(self._data, self._layout.shape(self._parts.shape[2]))

    @cached_property
    def _columns(self) -> list[slice]:
        """Return the position of each part's bytes in a row of all heads."""
        parts = range(self._sharding.parts)
        return [columns(self._sharding, self._layout, part) for part in parts]

    def publish(self, planes: int) -> None:
        """Note that the first `planes` planes of `whole` are complete."""
        if len(self._parts) > 1:
            new = slice(self._published, planes)
            for part, where in zip(self._parts, self._columns, strict=True):
                part[new] = self.whole[new, :, where]
        self._published = planes

    def read(self, tokens: int, into: Array) -> None:
        """Copy the first `tokens` tokens to `into` uint8 [planes, >= tokens, row_bytes]."""
        for part, where in zip(self._parts, self._columns, strict=True):
            into[:, :tokens, where] = part[:, :tokens]
