"""The link in the C++ backend's form: bytes that only its engines read."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from tensorrt_llm._fake.exchange import Cache, Link


class ContextPhaseParams(Struct, frozen=True, array_like=True):
    """Parameters in a context model's response."""

    first_gen_tokens: list[int]
    req_id: int
    address: str
    cache: Cache

    @property
    def link(self) -> Link:
        return Link(self.req_id, self.address, self.cache)

    def serialize(self) -> NDArray[np.uint8]:
        """Return them as uint8 [n]."""
        return np.frombuffer(msgspec.msgpack.encode(self), np.uint8)


def deserialize(data: NDArray[np.uint8]) -> ContextPhaseParams:
    """Read them. Raises ValueError: these are no context phase params."""
    try:
        return msgspec.msgpack.decode(data.tobytes(), type=ContextPhaseParams)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"context_phase_params cannot be read: {error}") from error
