"""Reading from a holder over a network that cannot read by itself, as TCP: the holder is asked.

    receiver                       holder, in its `progress`
    Hello: who I am         -->    connects back
    Peek a slot             -->
                            <--    Answer with the slot
    Mark a slot             -->    writes the word
                            <--    Answer
    Push ranges to me       -->    writes them, one-sided
    Wait, now and then      -->
                            <--    Answer, behind the last byte

Asked for, 64 MiB over loopback take 16 ms, and 55 ms where UCX imitates a read; and a receiver
that dies in the middle is an error for the holder, not its end (`nixl/agent.py`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pdserve.transfer.protocol import Spans, TransferError

Number = Annotated[int, Meta(ge=0)]


class _Ask(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The number comes back with the answer."""

    number: Number


class Hello(_Ask, frozen=True):
    secret: bytes
    """From the way: who has not been told of this holder is not served."""
    metadata: bytes
    """The receiver's agent."""


class Peek(_Ask, frozen=True):
    slot: Number


class Mark(_Ask, frozen=True):
    slot: Number
    word: Annotated[int, Meta(ge=0)]


class Push(_Ask, frozen=True):
    spans: bytes
    """Int64 [n, 3]: offset in the holder's data, address at the receiver, bytes."""
    device: int | None
    """Where the receiver's addresses are, as `Memory.device`."""
    seconds: Annotated[float, Meta(ge=0, le=3600)]
    """After which the receiver does not wait any longer."""


class Wait(_Ask, frozen=True):
    """Changes nothing. UCX tells that a peer has gone when one speaks to them, and only then."""


class Answer(Struct, frozen=True, forbid_unknown_fields=True):
    number: Number
    error: str = ""
    slot: bytes = b""


Ask = Hello | Peek | Mark | Push | Wait
encode = msgspec.msgpack.encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_ask = msgspec.msgpack.Decoder(Ask).decode


def check(spans: Spans, nbytes: int) -> None:
    """Raises: TransferError: spans that are not inside the holder's ``nbytes`` of data."""
    offsets, _, sizes = spans.T
    # Compared so that nothing overflows.
    wrong = (offsets < 0) | (sizes < 1) | (sizes > nbytes) | (offsets > nbytes - sizes)
    if wrong.any():
        offset, _, size = spans[wrong][0]
        raise TransferError(f"{size} bytes at offset {offset} are not in the holder's {nbytes}")
