"""What the scheduler and the instances say to each other, version 6.

A message is msgpack in one UINT8 tensor: ``request`` on the way in; on the way out
``reply``, any number of replies with the ids of the calls that they belong to, and the epoch of
the process that gives them. A request travels sealed (``pdserve.rpc.seal``).
Nothing here is part of the public contract; both ends of a deployment run the
same version, and a message of another version is refused. A field that is not known is ignored,
so that an optional one may be added without a new version.
Token ids are little-endian int32 bytes: ``numpy.frombuffer(ids, "<i4")``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from pdserve.errors import InstanceError, InvalidRequest
from pdserve.sampling import Sampling
from pdserve.transfer.reports import LinkReport, TransferReport

VERSION = 6

MAX_BESIDE_PROMPT = 2 << 20
"""Bytes of a request without its prompt: a sealed endpoint, or the link of an engine's own."""

MAX_TOKENS = 1 << 24
"""Of prompt and answer together, whatever the model; what it takes itself may be less."""

MAX_PEERS = 4096
"""Decodes that a request may name as its gateway's; of more, a gateway names so many."""

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
"""Of tokens."""
Token = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
"""An id; an instance knows its vocabulary."""
Ids = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Milliseconds = Annotated[float, Meta(ge=0, le=1 << 31)]
Sealed = Annotated[bytes, Meta(max_length=MAX_BESIDE_PROMPT - (1 << 10))]
Label = Annotated[str, Meta(max_length=128)]
Version = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class Room(Struct, frozen=True, array_like=True):
    """What a decode could still accept."""

    slots: Count
    blocks: Count
    """Of KV cache, those included that are kept for prefixes only; ``MAX_TOKENS``: any number."""


class PrefillRequest(Struct, frozen=True, tag="prefill"):
    """Compute the KV cache of a prompt and its first token; refuse at once if busy."""

    id: Id
    prompt: Ids
    sampling: Sampling
    tenant: Label
    deadline_ms: Milliseconds
    """Milliseconds from now after which the first token is worthless."""
    resumed_tokens: Count = 0
    """How many of the prompt's last tokens are output of this request already.

    Another pair of instances produced them before it failed. Penalties count them as output, and
    random numbers go on from their position.
    """
    gateway: Label = ""
    """Who asks: what has become free is kept for who has watched for it the longest."""
    hurry: bool = False
    """Others wait for this answer: tell the acceptance at once."""
    layered: bool = False
    """Tell the handle with the acceptance, for a decode that pulls layer by layer meanwhile."""
    only: bool = False
    """No decode will follow: the answer ends with the first token."""
    ignore_eos: bool = False
    suspect: bool = False
    """It may have ended an instance: tell the acceptance at once, and refuse it as busy while
    another one is here without a token."""
    trace: Label = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: Version = VERSION


class Watch(Struct, frozen=True, tag="watch"):
    """Say once when something has become free; a ``Release`` with its id ends it."""

    id: Id
    gateway: Label
    room: Room | None = None
    """What a decode has told last: say so at once if it is more now, and not otherwise."""
    version: Version = VERSION


class Release(Struct, frozen=True, tag="release"):
    """Give up whatever the instance holds for a request: compute, lease, blocks."""

    id: Id
    version: Version = VERSION


class Transferred(Struct, frozen=True, tag="transferred"):
    """Tell a prefill that a decode has its KV cache: one that has said that it does not see it."""

    id: Id
    version: Version = VERSION


class DecodeRequest(Struct, frozen=True, tag="decode"):
    """Pull a KV cache and go on from its first token; refuse at once if full."""

    id: Id
    prompt: Ids
    first_token: Token | None
    """None: it is not computed yet, and will stand in the lease."""
    handle: Sealed
    """A sealed ``KVHandle``; empty: the decode computes the prompt itself."""
    sampling: Sampling
    tenant: Label
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    """Tokens that are to come, the first one included."""
    ignore_eos: bool
    min_interval_ms: Milliseconds
    """At least this long between two replies with tokens."""
    resumed_tokens: Count = 0
    """See ``PrefillRequest``."""
    peers: Annotated[int, Meta(ge=1, le=MAX_PEERS)] = 1
    """Decodes among which the gateway spreads its requests, this one included.

    A decode counts its own open requests times ``peers`` as those of the gateway, and spaces its
    replies accordingly.
    """
    suspect: bool = False
    """It may have ended an instance: tell the acceptance at once, and refuse it as busy while
    another one is here without a token."""
    hurry: bool = False
    """The first token waits for this answer: tell the acceptance at once."""
    trace: Label = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: Version = VERSION


class Describe(Struct, frozen=True, tag="describe"):
    """A prefill says how its memory is reached."""

    id: Id
    version: Version = VERSION


class Connect(Struct, frozen=True, tag="connect"):
    """Connect a decode to a prefill: it opens a link, probes it and warms it.

    For a prefill that it is linked to already, nothing is done.
    """

    id: Id
    endpoint: Sealed
    """A sealed ``Endpoint``, as a prefill has told it."""
    version: Version = VERSION


SUSPECT = "suspect"
"""Reason of a ``Busy``: there is room, but for no other request that is ``suspect``."""


class Busy(Struct, frozen=True, tag="busy"):
    """Not accepted; nothing is held for the request."""

    reason: Label
    room: Room | None = None
    """Of a decode, as in all replies that have it."""


class Freed(Struct, frozen=True, tag="freed"):
    """Something may be free now, and is kept for this gateway for a moment."""

    room: Room | None = None


class Failed(Struct, frozen=True, tag="failed"):
    """Accepted, but it ended in an error; nothing is held for the request any more."""

    code: Label
    message: Annotated[str, Meta(max_length=1 << 20)]


class Accepted(Struct, frozen=True, tag="accepted"):
    """An instance has taken the request; sent only where the result takes longer than a moment."""

    handle: Sealed | None = None
    """A prefill's, where the request is ``layered``: the KV cache may be followed from now on."""
    room: Room | None = None


class Prefilled(Struct, frozen=True, tag="prefilled"):
    """The first token, and where the KV cache waits."""

    token: Token
    eos: bool
    handle: Sealed
    """A sealed ``KVHandle``."""
    cached_tokens: Count
    compute_ms: Milliseconds
    stored: Annotated[bytes, Meta(max_length=MAX_TOKENS // 4)] = b""
    """Chained hashes, 8 bytes each, of the prompt's prefixes that are cached here from now on."""
    unseen: bool = False
    """The prefill does not see when a decode has taken the KV cache: it wants a ``Transferred``."""


class Tokens(Struct, frozen=True, tag="tokens"):
    """New tokens of a stream; the last reply carries the finish reason."""

    start: Count
    """Index of the first of them in the answer: a reply that was lost on the way is noticed."""
    ids: Ids
    finish_reason: Annotated[str, Meta(pattern="^(stop|length|)$")] = ""
    transfer: TransferReport | None = None
    """On the first reply: how the KV cache came; where the decode has computed it, no bytes."""
    room: Room | None = None
    """On the first and the last reply."""


class NotConnected(Struct, frozen=True, tag="not_connected"):
    """A decode has no link to the holder of the KV cache; nothing is held.

    The two are to be connected before it is asked again.
    """


class Described(Struct, frozen=True, tag="described"):
    """How a prefill's memory is reached; the same bytes for as long as it lives."""

    endpoint: Sealed


class Connected(Struct, frozen=True, tag="connected"):
    """How the decode reaches the prefill."""

    prefill: Label
    link: LinkReport
    bytes_per_token: Annotated[int, Meta(ge=0, le=1 << 40)]
    """Of a KV cache."""
    room: Room | None = None


class Released(Struct, frozen=True, tag="released"):
    """Nothing is held for the request."""


Request = PrefillRequest | DecodeRequest | Watch | Release | Transferred | Describe | Connect
Reply = (
    Busy
    | Freed
    | Accepted
    | Failed
    | Prefilled
    | Tokens
    | Released
    | NotConnected
    | Described
    | Connected
)


class Batch(Struct, frozen=True, array_like=True):
    """What an instance says in one response."""

    epoch: bytes
    """Names its process; see `pdserve.node.epoch`. Empty: it does not say."""
    replies: Sequence[tuple[str, Reply]]
    """Call ids and a reply to each."""


_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_batches: msgspec.msgpack.Decoder[Batch] = msgspec.msgpack.Decoder(Batch)


def longest(context_length: int) -> int:
    """Bytes of a request to an instance of this context, at most."""
    return 4 * context_length + MAX_BESIDE_PROMPT


def encode(message: Request) -> bytes:
    return _encoder.encode(message)


def encode_replies(replies: Sequence[tuple[str, Reply]], epoch: bytes = b"") -> bytes:
    """A ``Batch``."""
    return _encoder.encode(Batch(epoch, replies))


def decode_request(data: bytes | memoryview) -> Request:
    """The request, whose numbers are in their ranges.

    Raises:
        InvalidRequest: they are not, or it is no request at all; the message names the field.
        InstanceError: one of another version.
    """
    try:
        message = _requests.decode(data)
        version = message.version
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # One of another version may have other fields.
        version = _version(data)
        if version == VERSION:
            raise InvalidRequest(f"malformed message: {error}{_given(data, error)}") from error
    if version != VERSION:
        raise InstanceError(f"message version {version}; this instance speaks version {VERSION}")
    return message


def decode_replies(data: bytes | memoryview) -> Batch:
    """Raises: InstanceError: these are no replies."""
    try:
        batch = _batches.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InstanceError(f"malformed message between scheduler and instance: {error}") from error
    for _, reply in batch.replies:
        if isinstance(reply, Tokens) and len(reply.ids) % 4:
            raise InstanceError(f"malformed message: ids of {len(reply.ids)} bytes; 4 are one id")
    return batch


class _Versioned(Struct):
    version: int = VERSION


_versions = msgspec.msgpack.Decoder(_Versioned)


def _version(data: bytes | memoryview) -> int:
    try:
        return _versions.decode(data).version
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return VERSION


def _given(data: bytes | memoryview, error: Exception) -> str:
    """The number that is out of its range; anything else may be a prompt, and is not repeated."""
    place = re.search(r"`\$\.(\w+)(?:\[(\d+)\])?`", str(error))
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        value = msgspec.msgpack.decode(data)[place[1] if place else ""]
        value = value[int(place[2])] if place and place[2] else value
        if isinstance(value, int | float):
            return f", not {value}"
    return ""
