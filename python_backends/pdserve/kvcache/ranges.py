"""A KV cache in its range, seen as one array whatever the cut."""

from __future__ import annotations

from functools import cached_property

from pdserve.kvcache.cut import Cut, columns
from pdserve.kvcache.layout import KVLayout
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array


class KVRange:
    """`tokens` tokens in `data` uint8 [cut.nbytes(layout, tokens)]."""

    def __init__(self, data: Array, layout: KVLayout, cut: Cut, tokens: int) -> None:
        self._columns = [columns(cut, layout, part) for part in range(cut.parts)]
        self._parts = data.reshape((cut.parts, layout.planes, tokens, cut.row_bytes(layout)))
        self._published = 0
        self._data = data
        self._shape = layout.shape(tokens)

    @cached_property
    def whole(self) -> Array:
        """Uint8 [planes, tokens, row_bytes]: the range itself, where it is of one part.

        Where ranks keep their heads apart it is memory of its own, that `publish` copies from. An
        engine whose ranks are separate devices has no use for it; on a CPU one process stands for
        all of them.
        """
        if len(self._parts) == 1:
            return self._parts[0]
        return arrays.like(self._data, self._shape)

    def publish(self, planes: int) -> None:
        """The first `planes` planes of `whole` are complete."""
        if len(self._parts) > 1:
            new = slice(self._published, planes)
            for part, where in zip(self._parts, self._columns, strict=True):
                part[new] = self.whole[new, :, where]
        self._published = planes

    def read(self, tokens: int, into: Array) -> None:
        """Copy the first `tokens` tokens to `into` uint8 [planes, >= tokens, row_bytes]."""
        for part, where in zip(self._parts, self._columns, strict=True):
            into[:, :tokens, where] = part[:, :tokens]
