"""The KV caches that are moved, and their content."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pdserve.kvcache.layout import KVLayout

LAYOUTS = {
    "SmolLM2-135M": KVLayout(30, 3, 64, "float32"),
    "Llama-3-8B": KVLayout(32, 8, 128, "bfloat16"),
    "70B, 1 of 8 ranks": KVLayout(80, 1, 128, "bfloat16"),
}
# Factor of a multiplicative hash: 2**64 / golden ratio. No two words are equal.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def pattern(nbytes: int) -> NDArray[np.uint8]:
    """Return the content of a holder's memory, in which any misplaced byte is noticed."""
    words = np.arange(1, nbytes // 8 + 2, dtype=np.uint64)
    words *= _FACTOR
    return words.view(np.uint8)[:nbytes]
