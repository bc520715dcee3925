"""Shape of a prompt's KV cache, the same in every engine process of a deployment."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import msgspec

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class KVLayout(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """One prompt's KV cache: [layers][2: K, V][tokens][kv_heads][head_dim], C order.

    A *plane* is one layer's K (or V), a *row* kv_heads * head_dim elements of it: one token's. As
    bytes the cache is uint8 [planes, tokens, row_bytes].
    """

    layers: Count
    kv_heads: Count
    head_dim: Count
    dtype: Literal["float32", "bfloat16", "float16"]

    @cached_property
    def itemsize(self) -> int:
        """Return the bytes of one element."""
        return _ITEMSIZE[self.dtype]

    @cached_property
    def planes(self) -> int:
        """Return the number of planes: K and V of each layer, which alternate."""
        return self.layers * 2

    @cached_property
    def row_bytes(self) -> int:
        """Return the bytes of one token of one plane."""
        return self.kv_heads * self.head_dim * self.itemsize

    @cached_property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token over all planes."""
        return self.planes * self.row_bytes

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of the KV cache of `tokens` tokens."""
        return tokens * self.bytes_per_token

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """Return the shape of the KV cache of `tokens` tokens as uint8."""
        return self.planes, tokens, self.row_bytes
