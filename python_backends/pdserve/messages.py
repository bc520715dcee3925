"""What the scheduler and the instances say to each other, version 5.

A message is msgpack in one UINT8 tensor: ``request`` on the way in; on the way out
``reply``, any number of replies with the ids of the calls that they belong to.
A request travels sealed (``pdserve.channels.seal``).
Nothing here is part of the public contract; both ends of a deployment run the
same version, and a message of another version is refused.
Token ids are little-endian int32 bytes: ``numpy.frombuffer(ids, "<i4")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from pdserve.errors import InstanceError
from pdserve.transfer.reports import Met, Pulled

VERSION = 5

MAX_BESIDE_PROMPT = 2 << 20
"""Bytes of a request without its prompt: a description, or the link of an engine's own."""


class Sampling(Struct, frozen=True, array_like=True):
    """How the next token is chosen; the defaults are greedy.

    Penalties as in OpenAI's API (presence, frequency: over the output) and in
    transformers (repetition: over prompt and output).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reproducible(self) -> bool:
        """A seed was given: the tokens may not depend on what else is being computed."""
        return not self.greedy and self.seed is not None

    @property
    def penalized(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class PrefillRequest(Struct, frozen=True, tag="prefill"):
    """Compute the KV cache of a prompt and its first token; refuse at once if busy."""

    id: str
    prompt: bytes
    sampling: Sampling
    tenant: str
    deadline_ms: float
    """Milliseconds from now after which the first token is worthless."""
    outputs: int = 0
    """So many of the prompt's last tokens are of the answer already: another pair began it."""
    gateway: str = ""
    """Who asks: what has become free is kept for who has watched for it the longest."""
    hurry: bool = False
    """Others wait for this answer: tell the acceptance at once."""
    layered: bool = False
    """Tell the handle with the acceptance, for a decode that pulls layer by layer meanwhile."""
    only: bool = False
    """No decode will follow: the answer ends with the first token."""
    ignore_eos: bool = False
    trace: str = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: int = VERSION


class Watch(Struct, frozen=True, tag="watch"):
    """Say once when something has become free; a ``Release`` with its id ends it."""

    id: str
    gateway: str
    version: int = VERSION


class Release(Struct, frozen=True, tag="release"):
    """Give up whatever the instance holds for a request: compute, lease, blocks."""

    id: str
    version: int = VERSION


class Taken(Struct, frozen=True, tag="taken"):
    """A decode has the KV cache of a prefill that does not see it by itself."""

    id: str
    version: int = VERSION


class DecodeRequest(Struct, frozen=True, tag="decode"):
    """Pull a KV cache and go on from its first token; refuse at once if full."""

    id: str
    prompt: bytes
    first_token: int | None
    """None: it is not computed yet, and will stand in the lease."""
    handle: bytes
    """A sealed ``KVHandle``; empty: the decode computes the prompt itself."""
    sampling: Sampling
    tenant: str
    max_tokens: int
    """Tokens that are to come, the first one included."""
    ignore_eos: bool
    min_interval_ms: float
    """At least this long between two replies with tokens."""
    outputs: int = 0
    """So many of the prompt's last tokens are of the answer already: another pair began it."""
    trace: str = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: int = VERSION


class Describe(Struct, frozen=True, tag="describe"):
    """A prefill says how its memory is reached."""

    id: str
    version: int = VERSION


class Join(Struct, frozen=True, tag="join"):
    """A decode meets a prefill: connects, probes, warms. For one that it knows, nothing is done."""

    id: str
    description: bytes
    """A sealed ``Description``, as a prefill has told it."""
    version: int = VERSION


class Busy(Struct, frozen=True, tag="busy"):
    """Not accepted; nothing is held for the request."""

    reason: str


class Freed(Struct, frozen=True, tag="freed"):
    """Something may be free now, and is kept for this gateway for a moment."""


class Failed(Struct, frozen=True, tag="failed"):
    """Accepted, but it ended in an error; nothing is held for the request any more."""

    code: str
    message: str


class Accepted(Struct, frozen=True, tag="accepted"):
    """An instance has taken the request; sent only where the result takes longer than a moment."""

    handle: bytes | None = None
    """A prefill's, where the request is ``layered``: the KV cache may be followed from now on."""


class Prefilled(Struct, frozen=True, tag="prefilled"):
    """The first token, and where the KV cache waits."""

    token: int
    eos: bool
    handle: bytes
    """A sealed ``KVHandle``."""
    cached_tokens: int
    compute_ms: float
    stored: bytes = b""
    """Chained hashes, 8 bytes each, of the prompt's prefixes that are cached here from now on."""
    unseen: bool = False
    """The prefill does not see when a decode has taken the KV cache: it wants a ``Taken``."""


class Tokens(Struct, frozen=True, tag="tokens"):
    """New tokens of a stream; the last reply carries the finish reason."""

    start: int
    """Index of the first of them in the answer: a reply that was lost on the way is noticed."""
    ids: bytes
    finish_reason: Annotated[str, Meta(pattern="^(stop|length|)$")] = ""
    pulled: Pulled | None = None
    """On the first reply: how the KV cache came; where the decode has computed it, no bytes."""


class Stranger(Struct, frozen=True, tag="stranger"):
    """A decode does not know the holder of the KV cache; nothing is held. Join, then ask again."""


class Described(Struct, frozen=True, tag="described"):
    """How a prefill's memory is reached; the same bytes for as long as it lives."""

    description: bytes


class Joined(Struct, frozen=True, tag="joined"):
    """How the decode reaches the prefill."""

    prefill: str
    met: Met
    bytes_per_token: int
    """Of a KV cache."""


class Released(Struct, frozen=True, tag="released"):
    """Nothing is held for the request."""


Request = PrefillRequest | DecodeRequest | Watch | Release | Taken | Describe | Join
Reply = (
    Busy | Freed | Accepted | Failed | Prefilled | Tokens | Released | Stranger | Described | Joined
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[list[tuple[str, Reply]]] = msgspec.msgpack.Decoder(
    list[tuple[str, Reply]]
)

T = TypeVar("T")


def longest(context_length: int) -> int:
    """Bytes of a request to an instance of this context, at most."""
    return 4 * context_length + MAX_BESIDE_PROMPT


def encode(message: Request) -> bytes:
    return _encoder.encode(message)


def encode_replies(replies: Sequence[tuple[str, Reply]]) -> bytes:
    """Call ids and a reply to each."""
    return _encoder.encode(replies)


def decode_request(data: bytes | memoryview) -> Request:
    """Raises: InstanceError: not a request of this version."""
    message = _decode(_requests, data)
    if message.version != VERSION:
        raise InstanceError(
            f"message version {message.version}; this instance speaks version {VERSION}"
        )
    return message


def decode_replies(data: bytes | memoryview) -> list[tuple[str, Reply]]:
    """Raises: InstanceError: these are no replies."""
    return _decode(_replies, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes | memoryview) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InstanceError(f"malformed message between scheduler and instance: {error}") from error
