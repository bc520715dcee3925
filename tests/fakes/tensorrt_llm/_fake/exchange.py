"""The messages between a context engine and a generation engine."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from pdserve.kvcache.layout import KVLayout


class TransferError(RuntimeError):
    """A KV cache cannot be had."""


class Cache(Struct, frozen=True):
    """The properties that two engines must have in common."""

    model: str
    """A fingerprint of the model's weights."""
    layout: KVLayout
    tokens_per_block: int

    def check(self, other: Cache) -> None:
        """Raises TransferError: KV caches cannot be exchanged with another engine."""
        pairs = {
            "dtype": (self.layout.dtype, other.layout.dtype),
            "layout": (self.layout, other.layout),
            "tokens_per_block": (self.tokens_per_block, other.tokens_per_block),
            "model": (self.model, other.model),
        }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise TransferError(
                    f"{name} of the generation engine is {ours}, of the context engine {theirs}"
                )


class Link(Struct, frozen=True):
    """The place where a generation engine finds a KV cache."""

    id: int
    address: str
    """tcp://host:port."""
    cache: Cache | None = None
    """The context engine's cache, if the link contains it."""


class Ask(Struct, frozen=True):
    id: int
    cache: Cache


class Give(Struct, frozen=True):
    error: str = ""
    file: str = ""
    tokens: int = 0


def line_of(message: Ask | Give) -> bytes:
    return msgspec.json.encode(message) + b"\n"
