"""Shape of a prompt's KV cache, the same in every engine process of a deployment."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """One prompt's KV cache: [layers][2: K, V][tokens][kv_heads][head_dim], C order.

    A *row* is kv_heads * head_dim elements: one token of one layer's K (or V). Seen as bytes the
    cache is uint8 [layers * 2, tokens, row_bytes].
    """

    layers: Count
    kv_heads: Count
    head_dim: Count
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one layer's K (or V)."""
        return self.kv_heads * self.head_dim * self.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers, K and V."""
        return self.layers * 2 * self.row_bytes

    def nbytes(self, tokens: int) -> int:
        """Bytes of the KV cache of `tokens` tokens."""
        return tokens * self.bytes_per_token

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """Of the KV cache of `tokens` tokens as uint8."""
        return self.layers * 2, tokens, self.row_bytes
