"""The messages to the instances of a deployment and from them, version 7.

A message is msgpack in one UINT8 tensor: ``request`` to the instance; from it ``reply``, any number
of replies with the ids of the calls that they belong to, and the epoch of the process that sends
them. A request travels sealed (``pdserve.rpc.seal``), with the number of the assignment that it is
for: an instance that has another one answers ``Reassigned``. Gateways send the messages that serve
requests; the node agent those of the control plane, which are bound to one process by its epoch
(`pdserve.node.epoch`), and to its present assignment by ``number``.

Nothing here is part of the public contract; both ends of a deployment run the same version, and a
message of another version is refused. An unknown field is ignored, so that an optional one may be
added without a new version. Token ids are little-endian int32 bytes:
``numpy.frombuffer(ids, "<i4")``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from pdserve.control.assignment import Assignment, Number
from pdserve.control.records import Phase
from pdserve.errors import InstanceError, InvalidRequest
from pdserve.kvcache.handle import EPOCH_BYTES, Epoch
from pdserve.sampling import Sampling
from pdserve.transfer.reports import LinkReport, TransferReport

VERSION = 7

MAX_BESIDE_PROMPT = 2 << 20
"""Maximum bytes of a request without its prompt: a sealed endpoint, or the link of an external
engine."""

MAX_TOKENS = 1 << 24
"""Maximum tokens of prompt and answer together, whatever the model; a model may allow fewer."""

MAX_PEERS = 4096
"""Maximum number of decodes that a request may state for its gateway; of more, it states so
many."""

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
"""Number of tokens."""
Token = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
"""A token id; the instance checks it against its vocabulary."""
Ids = Annotated[bytes, Meta(max_length=4 * MAX_TOKENS)]
Milliseconds = Annotated[float, Meta(ge=0, le=1 << 31)]
Seconds = Annotated[float, Meta(ge=0, le=1 << 20)]
Sealed = Annotated[bytes, Meta(max_length=MAX_BESIDE_PROMPT - (1 << 10))]
Label = Annotated[str, Meta(max_length=128)]
Salt = Annotated[str, Meta(max_length=256)]
Version = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class Room(Struct, frozen=True, array_like=True):
    """The slots and KV blocks that a decode could still accept."""

    slots: Count
    blocks: Count
    """Number of KV blocks, those included that are kept for prefixes only; ``MAX_TOKENS``: any
    number."""


class PrefillRequest(Struct, frozen=True, tag="prefill"):
    """Compute the KV cache of a prompt and its first token; refuse at once if busy."""

    id: Id
    prompt: Ids
    sampling: Sampling
    salt: Salt
    """Only prompts of one salt share cached prefixes: those of one scenario and tenant."""
    deadline_ms: Milliseconds
    """Milliseconds from now after which the first token is useless."""
    resumed_tokens: Count = 0
    """Number of the prompt's last tokens that are output of this request already.

    Another pair of instances produced them before it failed. Penalties count them as output, and
    random numbers go on from their position.
    """
    gateway: Label = ""
    """Name of the gateway: what becomes free is kept for the one that has watched for it the
    longest."""
    hurry: bool = False
    """Other requests wait for this answer: report the acceptance at once."""
    layered: bool = False
    """Send the handle with the acceptance, for a decode that pulls layer by layer meanwhile."""
    only: bool = False
    """No decode will follow: the answer ends with the first token."""
    ignore_eos: bool = False
    suspect: bool = False
    """The request may have ended an instance: report the acceptance at once, and refuse it as busy
    while another suspect is here without a token."""
    trace: Label = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: Version = VERSION


class Watch(Struct, frozen=True, tag="watch"):
    """Report once when something has become free; a ``Release`` with its id ends the watch."""

    id: Id
    gateway: Label
    room: Room | None = None
    """The room that a decode reported last: report at once if it is larger now, and not
    otherwise."""
    version: Version = VERSION


class Release(Struct, frozen=True, tag="release"):
    """Release whatever the instance holds for a request: compute, lease, blocks."""

    id: Id
    version: Version = VERSION


class Transferred(Struct, frozen=True, tag="transferred"):
    """Tell a prefill that cannot see it that a decode has its KV cache."""

    id: Id
    version: Version = VERSION


class DecodeRequest(Struct, frozen=True, tag="decode"):
    """Pull a KV cache and go on from its first token; refuse at once if full."""

    id: Id
    prompt: Ids
    first_token: Token | None
    """None: it is not computed yet, and the decode will read it from the lease."""
    handle: Sealed
    """A sealed ``KVHandle``; empty: the decode computes the prompt itself."""
    sampling: Sampling
    salt: Salt
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    """Number of tokens to generate, the first one included."""
    ignore_eos: bool
    min_interval_ms: Milliseconds
    """Minimum time between two replies with tokens."""
    resumed_tokens: Count = 0
    """See ``PrefillRequest``."""
    peers: Annotated[int, Meta(ge=1, le=MAX_PEERS)] = 1
    """Number of decodes among which the gateway spreads its requests, this one included.

    A decode multiplies its own open requests by ``peers`` to estimate those of the gateway, and
    spaces its replies accordingly.
    """
    suspect: bool = False
    """The request may have ended an instance: report the acceptance at once, and refuse it as busy
    while another suspect is here without a token."""
    hurry: bool = False
    """The first token waits for this answer: report the acceptance at once."""
    trace: Label = ""
    """W3C traceparent of the attempt; empty: it is not traced."""
    version: Version = VERSION


class Describe(Struct, frozen=True, tag="describe"):
    """Ask a prefill how its memory is reached."""

    id: Id
    version: Version = VERSION


class Connect(Struct, frozen=True, tag="connect"):
    """Connect a decode to a prefill: the decode opens a link, probes it and warms it.

    If it is linked to the prefill already, nothing is done.
    """

    id: Id
    endpoint: Sealed
    """A sealed ``Endpoint``, as the prefill has described it."""
    version: Version = VERSION


class Inspect(Struct, frozen=True, tag="inspect"):
    """Ask an instance what it is; it answers ``Inspected``, as to the other messages below."""

    id: Id
    version: Version = VERSION


class Drain(Struct, frozen=True, tag="drain"):
    """Accept no request any more, and finish those that are here."""

    id: Id
    epoch: Epoch
    """Epoch of the process."""
    number: Number
    """Number of its present assignment."""
    within_s: Seconds
    """Seconds after which what is left ends with the code of ``errors.Drained``. Of several drains
    the earliest end counts."""
    version: Version = VERSION


class Resume(Struct, frozen=True, tag="resume"):
    """Serve again under the same assignment, after a drain or in its middle."""

    id: Id
    epoch: Epoch
    number: Number
    version: Version = VERSION


class Assign(Struct, frozen=True, tag="assign"):
    """Take another assignment, with a higher number; the instance must hold nothing."""

    id: Id
    epoch: Epoch
    number: Number
    """Number of its present assignment."""
    assignment: Assignment
    version: Version = VERSION


class Unlink(Struct, frozen=True, tag="unlink"):
    """Close a decode's link to the memory of a prefill, which is about to be released.

    Pulls in progress on it end first, or fail within a bound. A link that another process of that
    name has, or the same process under a higher number, stays.
    """

    id: Id
    prefill: Label
    epoch: Epoch
    """Epoch of the memory (``Inspected.memory``)."""
    number: Number
    """Number of the assignment under which the prefill has had it."""
    version: Version = VERSION


SUSPECT = "suspect"
"""Reason of a ``Busy``: there is room, but not for another request that is ``suspect``."""


class Busy(Struct, frozen=True, tag="busy"):
    """The request is not accepted; nothing is held for it."""

    reason: Label
    room: Room | None = None
    """Room of a decode, here and in all replies that have it."""


class Freed(Struct, frozen=True, tag="freed"):
    """Something may be free now, and is reserved for this gateway for a moment."""

    room: Room | None = None


class Failed(Struct, frozen=True, tag="failed"):
    """The request was accepted, but ended in an error; nothing is held for it any more."""

    code: Label
    message: Annotated[str, Meta(max_length=1 << 20)]


class Accepted(Struct, frozen=True, tag="accepted"):
    """The request is accepted; sent only where the result takes longer than a moment."""

    handle: Sealed | None = None
    """A prefill's handle if the request is ``layered``: the KV cache may be followed from now
    on."""
    room: Room | None = None


class Prefilled(Struct, frozen=True, tag="prefilled"):
    """The first token, and the handle of the KV cache that waits."""

    token: Token
    eos: bool
    handle: Sealed
    """A sealed ``KVHandle``."""
    cached_tokens: Count
    compute_ms: Milliseconds
    stored: Annotated[bytes, Meta(max_length=MAX_TOKENS // 4)] = b""
    """Chained hashes, 8 bytes each, of the prompt's prefixes that are cached here from now on."""
    unseen: bool = False
    """True if the prefill cannot see when a decode has the KV cache, and needs a
    ``Transferred``."""


class Tokens(Struct, frozen=True, tag="tokens"):
    """New tokens of an answer; the last reply carries the finish reason."""

    start: Count
    """Index of the first of them in the answer, so that a lost reply is noticed."""
    ids: Ids
    finish_reason: Annotated[str, Meta(pattern="^(stop|length|)$")] = ""
    transfer: TransferReport | None = None
    """In the first reply: how the KV cache was transferred; if the decode has computed it, no
    bytes."""
    room: Room | None = None
    """Sent in the first and the last reply."""


class NotConnected(Struct, frozen=True, tag="not_connected"):
    """The decode has no link to the holder of the KV cache; nothing is held.

    The two must be connected before it is asked again.
    """


class Described(Struct, frozen=True, tag="described"):
    """How a prefill's memory is reached; the same bytes for as long as its process lives."""

    endpoint: Sealed


class Connected(Struct, frozen=True, tag="connected"):
    """How the decode reaches the prefill."""

    prefill: Label
    link: LinkReport
    bytes_per_token: Annotated[int, Meta(ge=0, le=1 << 40)]
    """Bytes of KV cache per token."""
    room: Room | None = None


class Released(Struct, frozen=True, tag="released"):
    """Nothing is held for the request."""


class Reassigned(Struct, frozen=True, tag="reassigned"):
    """The instance has another assignment, or serves no new request under this one.

    Nothing is held for the call.
    """

    assignment: Assignment
    """The present one."""
    phase: Phase


class Inspected(Struct, frozen=True, tag="inspected"):
    """The assignment and phase of an instance, and what it holds."""

    assignment: Assignment
    phase: Phase
    epoch: Epoch
    used: Count
    """Slots that requests hold."""
    leases: Count
    """KV caches that a decode may still read, those in quarantine included."""
    kind: Literal["prefill", "decode", "flexible"]
    """Its fixed role, or that it can have either."""
    memory: Annotated[bytes, Meta(max_length=EPOCH_BYTES)] = b""
    """Epoch of the memory that decodes link to; empty: it has none."""


class Unlinked(Struct, frozen=True, tag="unlinked"):
    """There is no such link any more."""


Request = (
    PrefillRequest
    | DecodeRequest
    | Watch
    | Release
    | Transferred
    | Describe
    | Connect
    | Inspect
    | Drain
    | Resume
    | Assign
    | Unlink
)
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
    | Reassigned
    | Inspected
    | Unlinked
)


class Batch(Struct, frozen=True, array_like=True):
    """The replies that an instance sends in one response."""

    epoch: bytes
    """Name of its process; see `pdserve.node.epoch`. Empty: not given."""
    replies: Sequence[tuple[str, Reply]]
    """Call ids, with a reply to each."""


_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_batches: msgspec.msgpack.Decoder[Batch] = msgspec.msgpack.Decoder(Batch)


def longest(context_length: int) -> int:
    """Return the maximum bytes of a request to an instance of this context length."""
    return 4 * context_length + MAX_BESIDE_PROMPT


def encode(message: Request) -> bytes:
    return _encoder.encode(message)


def encode_replies(replies: Sequence[tuple[str, Reply]], epoch: bytes = b"") -> bytes:
    """Encode a ``Batch``."""
    return _encoder.encode(Batch(epoch, replies))


def decode_request(data: bytes | memoryview) -> Request:
    """Decode a request and check that its numbers are in their ranges.

    Raises:
        InvalidRequest: they are not, or it is no request at all; the message names the field.
        InstanceError: it is a request of another version.
    """
    try:
        message = _requests.decode(data)
        version = message.version
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        # A message of another version may have other fields.
        version = _version(data)
        if version == VERSION:
            raise InvalidRequest(f"malformed message: {error}{_given(data, error)}") from error
    if version != VERSION:
        raise InstanceError(f"message version {version}; this instance speaks version {VERSION}")
    return message


def decode_replies(data: bytes | memoryview) -> Batch:
    """Decode a batch of replies. Raises InstanceError if it is malformed."""
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
    """Name the number that is out of range; anything else may be a prompt, and is not repeated."""
    place = re.search(r"`\$\.(\w+)(?:\[(\d+)\])?`", str(error))
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        value = msgspec.msgpack.decode(data)[place[1] if place else ""]
        value = value[int(place[2])] if place and place[2] else value
        if isinstance(value, int | float):
            return f", not {value}"
    return ""
