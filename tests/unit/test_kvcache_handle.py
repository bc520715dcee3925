"""KVHandle: round trip, size, and what is refused when it is decoded or checked."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import HandleError
from pdserve.kvcache.handle import KVHandle
from pdserve.kvcache.layout import KVLayout

# msgspec lets the one of invalid UTF-8 through as it is.
REFUSED = (msgspec.MsgspecError, UnicodeDecodeError)
LAYOUT = KVLayout(30, 3, 64, "float32")
GOOD = KVHandle(
    fingerprint="smollm2",
    layout=LAYOUT,
    tokens=7,
    region="pdserve-prefill-0",
    offset=4096,
    lease=3,
    nonce=bytes(range(16)),
    epoch=bytes(range(8)),
    expires=100.0,
)

counts = st.integers(1, 1 << 20)
layouts = st.builds(
    KVLayout, counts, counts, counts, st.sampled_from(["float32", "bfloat16", "float16"])
)
handles = st.builds(
    KVHandle,
    fingerprint=st.from_regex(r"[!-~]{1,128}", fullmatch=True),
    layout=layouts,
    tokens=st.integers(1, 1 << 24),
    region=st.from_regex(r"pdserve-[a-z0-9-]{1,56}", fullmatch=True),
    offset=st.integers(0, (1 << 63) - 1),
    lease=st.integers(0, (1 << 31) - 1),
    nonce=st.binary(min_size=16, max_size=16),
    epoch=st.binary(min_size=8, max_size=8),
    expires=st.floats(0, 1e12),
)


def decode(data: bytes) -> KVHandle:
    return msgspec.msgpack.decode(data, type=KVHandle)


@settings(deadline=None)
@given(handles)
def test_round_trip_in_less_than_a_kibibyte(handle: KVHandle) -> None:
    data = msgspec.msgpack.encode(handle)
    assert len(data) < 512
    assert decode(data) == handle


@settings(deadline=None)
@given(handles, st.data())
def test_truncated_is_refused(handle: KVHandle, data: st.DataObject) -> None:
    encoded = msgspec.msgpack.encode(handle)
    with pytest.raises(REFUSED):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@settings(deadline=None)
@given(handles, st.data())
def test_bit_flips_never_crash(handle: KVHandle, data: st.DataObject) -> None:
    encoded = bytearray(msgspec.msgpack.encode(handle))
    for bit in data.draw(st.lists(st.integers(0, len(encoded) * 8 - 1), min_size=1, max_size=4)):
        encoded[bit // 8] ^= 1 << bit % 8
    try:
        decode(bytes(encoded)).check(handle.fingerprint, handle.layout, 0.0)
    except (*REFUSED, HandleError):
        pass


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(REFUSED):
        decode(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0),
        ("version", 2),
        ("fingerprint", ""),
        ("fingerprint", "x" * 129),
        ("fingerprint", "a\nb"),
        ("tokens", 0),
        ("tokens", -1),
        ("tokens", 1 << 25),
        ("tokens", 1.5),
        ("region", "pdserve-"),
        ("region", "pdserve-a\n"),
        ("region", "pdserve-A"),
        ("region", "pdserve-a/../../etc/passwd"),
        ("region", "/dev/shm/pdserve-a"),
        ("region", "other"),
        ("region", "pdserve-" + "a" * 57),
        ("offset", -1),
        ("offset", 1 << 63),
        ("lease", -1),
        ("lease", 1 << 31),
        ("nonce", b""),
        ("nonce", bytes(15)),
        ("nonce", bytes(17)),
        ("epoch", bytes(7)),
        ("epoch", bytes(9)),
        ("expires", math.nan),
        ("expires", math.inf),
        ("expires", -1.0),
        ("layout", [0, 3, 64, "float32"]),
        ("layout", [30, 3, 64, "float64"]),
        ("layout", [30, 3, 64]),
        ("unknown", 1),
    ],
)
def test_a_malformed_field_is_refused_by_name(field: str, value: object) -> None:
    fields = msgspec.to_builtins(GOOD, builtin_types=(bytes,)) | {field: value}
    with pytest.raises(msgspec.ValidationError, match=field):
        decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("fingerprint", "layout", "now", "message"),
    [
        ("llama", LAYOUT, 0.0, "of model 'smollm2'; this instance has 'llama'"),
        ("smollm2", KVLayout(30, 3, 64, "bfloat16"), 0.0, "float32.*this instance has.*bfloat16"),
        ("smollm2", LAYOUT, 100.0, "expired 0.000 s ago"),
        ("smollm2", LAYOUT, math.nan, "expired"),
    ],
)
def test_check_names_the_mismatch(
    fingerprint: str, layout: KVLayout, now: float, message: str
) -> None:
    GOOD.check("smollm2", LAYOUT, 99.9)
    with pytest.raises(HandleError, match=message):
        GOOD.check(fingerprint, layout, now)


def test_layout_counts_bytes() -> None:
    layout = KVLayout(2, 3, 64, "bfloat16")
    assert layout.row_bytes == 3 * 64 * 2
    assert layout.bytes_per_token == 2 * 2 * layout.row_bytes
    assert layout.nbytes(5) == 5 * layout.bytes_per_token
    assert layout.shape(5) == (4, 5, layout.row_bytes)
