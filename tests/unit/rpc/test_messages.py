"""Tests for internal messages: each number and each length has a range, in both directions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import pytest
from msgspec import inspect

from pdserve.errors import InstanceError, InvalidRequest
from pdserve.rpc import messages
from pdserve.rpc.messages import (
    Connect,
    Connected,
    DecodeRequest,
    Describe,
    Failed,
    Prefilled,
    PrefillRequest,
    Release,
    Reply,
    Request,
    Tokens,
    Watch,
)
from pdserve.sampling import Sampling
from pdserve.transfer.reports import NO_TRANSFER, LinkReport

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFILL = PrefillRequest("call", b"\1\0\0\0", Sampling(), "tenant", 1000.0)
DECODE = DecodeRequest("call", b"\1\0\0\0", 1, b"handle", Sampling(), "", 8, False, 0.0)
LINK = LinkReport("shm", "", 0.0, 1e9, {}, False)

BAD_REQUESTS = [
    *((PREFILL, "id", value) for value in ("", "x" * 257)),
    *((PREFILL, "deadline_ms", value) for value in (-1.0, math.nan, math.inf, -math.inf, 1e10)),
    *((PREFILL, "resumed_tokens", value) for value in (-1, 1 << 40)),
    (PREFILL, "salt", "x" * 257),
    (PREFILL, "gateway", "x" * 129),
    (PREFILL, "trace", "x" * 129),
    *((DECODE, "max_tokens", value) for value in (-39, 0, 1 << 40, -(1 << 63), (1 << 64) - 1)),
    *((DECODE, "first_token", value) for value in (-1, 1 << 31)),
    *((DECODE, "min_interval_ms", value) for value in (-1.0, math.nan, math.inf)),
    *((DECODE, "resumed_tokens", value) for value in (-1, 1 << 40)),
    *((DECODE, "peers", value) for value in (-1, 0, 4097)),
    (DECODE, "handle", bytes(2 << 20)),
    (Connect("call", b"x"), "endpoint", bytes(2 << 20)),
    (Watch("call", "gateway"), "gateway", "x" * 129),
    (Release("call"), "id", ""),
    (Describe("call"), "id", "x" * 257),
]
BAD_SAMPLING = [
    *((0, value) for value in (-0.1, 100.1, math.nan, math.inf)),
    *((1, value) for value in (-1, 1 << 25)),
    *((2, value) for value in (0.0, -1.0, 1.1, math.nan)),
    (3, -1),
    *((4, value) for value in (0.0, 10.1, math.nan)),
    *((place, value) for place in (5, 6) for value in (-2.1, 2.1, math.nan)),
]
BAD_REPLIES: list[tuple[Reply, str, Any]] = [
    *((Prefilled(1, False, b"", 0, 0.0), "token", value) for value in (-1, 1 << 31)),
    *((Prefilled(1, False, b"", 0, 0.0), "cached_tokens", value) for value in (-1, 1 << 40)),
    *((Prefilled(1, False, b"", 0, 0.0), "compute_ms", value) for value in (-1.0, math.nan)),
    (Tokens(1, b"\1\0\0\0"), "start", -1),
    (Tokens(1, b"\1\0\0\0"), "ids", b"\1\0\0"),
    (Tokens(1, b"\1\0\0\0"), "finish_reason", "bored"),
    (Connected("prefill_0", LINK, 1), "bytes_per_token", -1),
    (Failed("INTERNAL", ""), "message", "x" * (2 << 20)),
]


@pytest.mark.parametrize(("good", "field", "value"), BAD_REQUESTS)
def test_a_number_out_of_its_range_is_refused_by_name(
    good: Request, field: str, value: Any
) -> None:
    assert messages.decode_request(messages.encode(good)) == good
    bad = messages.encode(msgspec.structs.replace(good, **{field: value}))
    with pytest.raises(InvalidRequest, match=rf"Expected .*`\$\.{field}`") as refused:
        messages.decode_request(bad)
    if isinstance(value, int | float):
        assert str(refused.value).endswith(f", not {value}")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(("place", "value"), BAD_SAMPLING)
def test_a_sampling_number_out_of_its_range_is_refused_by_name(place: int, value: float) -> None:
    fields = list(msgspec.structs.astuple(Sampling()))
    fields[place] = value
    bad = messages.encode(msgspec.structs.replace(PREFILL, sampling=Sampling(*fields)))
    with pytest.raises(InvalidRequest, match=rf"`\$\.sampling\[{place}\]`, not {value}"):
        messages.decode_request(bad)


@pytest.mark.parametrize(("good", "field", "value"), BAD_REPLIES)
def test_a_reply_out_of_its_range_is_refused_by_name(good: Reply, field: str, value: Any) -> None:
    assert messages.decode_replies(messages.encode_replies([("call", good)])).replies == [
        ("call", good)
    ]
    bad = msgspec.structs.replace(good, **{field: value})
    with pytest.raises(InstanceError, match="malformed"):
        messages.decode_replies(messages.encode_replies([("call", bad)]))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x81\xa4type\xa6decode", b"\x80", b"\xc0"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="malformed"):
        messages.decode_request(data)


def test_another_version_is_told_before_its_fields() -> None:
    newer = {"type": "decode", "version": 9, "max_tokens": "many", "new": 1}
    with pytest.raises(InstanceError, match=r"version 9; .* version 7"):
        messages.decode_request(msgspec.msgpack.encode(newer))


def test_a_message_of_the_version_before_is_refused_by_its_version() -> None:
    for before in (
        {"type": "join", "id": "call", "description": b"x", "version": 6},
        {"type": "watch", "id": "call", "gateway": "pdserve", "version": 6},
    ):
        with pytest.raises(InstanceError, match=r"version 6; .* version 7"):
            messages.decode_request(msgspec.msgpack.encode(before))


def test_a_field_that_is_not_known_is_ignored() -> None:
    """An optional field can therefore be added without a new version."""
    for message in (PREFILL, DECODE, Release("call")):
        fields = msgspec.msgpack.decode(messages.encode(message))
        assert messages.decode_request(msgspec.msgpack.encode({**fields, "new": 1})) == message
    reply = [b"", [["call", {"type": "failed", "code": "INTERNAL", "message": "", "new": 1}]]]
    [(_, decoded)] = messages.decode_replies(msgspec.msgpack.encode(reply)).replies
    assert decoded == Failed("INTERNAL", "")


def test_a_prompt_is_never_repeated() -> None:
    bad = {"type": "prefill", "id": "call", "prompt": "a secret", "deadline_ms": 1}
    with pytest.raises(InvalidRequest, match="malformed") as refused:
        messages.decode_request(msgspec.msgpack.encode(bad))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("kind", [*get_args(Request), *get_args(Reply)])
def test_every_field_has_a_range(kind: type) -> None:
    """This holds for new fields, too."""
    assert list(_unbounded(inspect.type_info(kind), kind.__name__)) == []


def test_the_defaults_are_in_range() -> None:
    reply = Tokens(0, b"", "stop", NO_TRANSFER)
    assert messages.decode_replies(messages.encode_replies([("call", reply)])).replies == [
        ("call", reply)
    ]


def _unbounded(kind: inspect.Type, name: str) -> Iterator[str]:
    """Return the names of the fields under it whose size has no bound."""
    inner: list[tuple[inspect.Type, str]] = []
    if isinstance(kind, inspect.StructType):
        inner = [(field.type, f"{name}.{field.name}") for field in kind.fields]
    elif isinstance(kind, inspect.UnionType):
        inner = [(one, name) for one in kind.types]
    elif isinstance(kind, inspect.DictType):
        inner = [(kind.key_type, name), (kind.value_type, name)]
        yield from () if kind.max_length is not None else (name,)
    if not inner and not _bounded(kind):
        # A seed has all 64 bits, which is more than msgspec accepts as a bound.
        yield from () if name.endswith(".seed") else (name,)
    for one, called in inner:
        yield from _unbounded(one, called)


def _bounded(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return (kind.ge is not None or kind.gt is not None) and kind.le is not None
    if isinstance(kind, inspect.StrType):
        return kind.max_length is not None or kind.pattern is not None
    if isinstance(kind, inspect.BytesType):
        return kind.max_length is not None
    finite = inspect.LiteralType | inspect.EnumType | inspect.BoolType | inspect.NoneType
    return isinstance(kind, inspect.StructType | finite)
