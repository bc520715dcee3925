"""Tests for KVHandle: round trip, size, seal, and what is refused on opening or checking."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import HandleError
from pdserve.kvcache.handle import KEY_BYTES, KVHandle, seal, unseal
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding
from pdserve.transfer.endpoint import Endpoint

KEY = bytes(range(KEY_BYTES))
LAYOUT = KVLayout(30, 3, 64, "float32")
GOOD = KVHandle(
    fingerprint="smollm2",
    layout=LAYOUT,
    tokens=7,
    epoch=bytes(range(8)),
    number=5,
    offset=4096,
    lease=3,
    nonce=bytes(range(16)),
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
    sharding=st.builds(Sharding, counts, counts),
    tokens=st.integers(1, 1 << 24),
    epoch=st.binary(min_size=8, max_size=8),
    number=st.integers(1, (1 << 63) - 1),
    offset=st.integers(0, (1 << 63) - 1),
    lease=st.integers(0, (1 << 31) - 1),
    nonce=st.binary(min_size=16, max_size=16),
    expires=st.floats(0, 1e12),
)
keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


@given(handles, keys)
def test_round_trip_in_less_than_a_kibibyte(handle: KVHandle, key: bytes) -> None:
    data = seal(handle, key)
    assert len(data) < 400
    assert unseal(data, KVHandle, key) == handle


def test_one_of_a_usual_model_is_small() -> None:
    assert len(seal(GOOD, KEY)) < 200


@given(handles, st.data())
def test_truncated_is_refused(handle: KVHandle, data: st.DataObject) -> None:
    sealed = seal(handle, KEY)
    with pytest.raises(HandleError, match="its MAC is wrong"):
        unseal(sealed[: data.draw(st.integers(0, len(sealed) - 1))], KVHandle, KEY)


@given(handles, st.binary(min_size=1, max_size=64))
def test_longer_is_refused(handle: KVHandle, more: bytes) -> None:
    with pytest.raises(HandleError, match="its MAC is wrong"):
        unseal(seal(handle, KEY) + more, KVHandle, KEY)


@given(handles, st.data())
def test_flipped_bits_are_refused(handle: KVHandle, data: st.DataObject) -> None:
    sealed = bytearray(seal(handle, KEY))
    bits = st.sets(st.integers(0, len(sealed) * 8 - 1), min_size=1, max_size=4)
    for bit in data.draw(bits):
        sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HandleError, match="its MAC is wrong"):
        unseal(bytes(sealed), KVHandle, KEY)


@given(handles, keys, keys)
def test_another_key_is_refused(handle: KVHandle, key: bytes, other: bytes) -> None:
    if key != other:
        with pytest.raises(HandleError, match="is not of this deployment"):
            unseal(seal(handle, key), KVHandle, other)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    for kind in (KVHandle, Endpoint):
        with pytest.raises(HandleError, match=f"{kind.__name__} of {len(data)} bytes is not of"):
            unseal(data, kind, KEY)


def test_one_message_does_not_pass_for_another() -> None:
    """A message of another type under the same key is refused, whatever its bytes are."""

    class Other(msgspec.Struct):
        version: int

    class KVHandleX(KVHandle):
        """A message type with the same fields."""

    assert unseal(seal(Other(2), KEY), Other, KEY) == Other(2)
    other = KVHandleX(**msgspec.structs.asdict(GOOD))
    for sealed in (seal(Other(2), KEY), seal(other, KEY)):
        with pytest.raises(HandleError, match=r"KVHandle of .* its MAC is wrong"):
            unseal(sealed, KVHandle, KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0),
        ("version", 1),
        ("version", 2),
        ("version", 3),
        ("version", 5),
        ("fingerprint", ""),
        ("fingerprint", "x" * 129),
        ("fingerprint", "a\nb"),
        ("tokens", 0),
        ("tokens", -1),
        ("tokens", 1 << 25),
        ("tokens", 1.5),
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
        ("sharding", [0, 1]),
        ("sharding", [1, -1]),
        ("sharding", {}),
        ("region", "pdserve-a"),
        ("unknown", 1),
    ],
)
def test_a_malformed_field_is_refused_by_name(field: str, value: object) -> None:
    """A malformed field is refused even if the sender has the key."""
    fields = msgspec.to_builtins(GOOD, builtin_types=(bytes,)) | {field: value}
    made = msgspec.defstruct("KVHandle", [(name, object) for name in fields])(**fields)
    with pytest.raises(HandleError, match=f"is malformed: .*{field}"):
        unseal(seal(made, KEY), KVHandle, KEY)


@pytest.mark.parametrize(
    ("fingerprint", "layout", "sharding", "message"),
    [
        ("llama", LAYOUT, Sharding(), "of model 'smollm2'; this instance has 'llama'"),
        (
            "smollm2",
            KVLayout(30, 3, 64, "bfloat16"),
            Sharding(),
            "float32.*this instance has.*bfloat16",
        ),
        ("smollm2", KVLayout(30, 1, 64, "float32"), Sharding(), "kv_heads=3.*has.*kv_heads=1"),
        (
            "smollm2",
            LAYOUT,
            Sharding(3, 1),
            "has .*ranks=1.*; this instance expects .*ranks=3",
        ),
    ],
)
def test_check_names_the_mismatch(
    fingerprint: str, layout: KVLayout, sharding: Sharding, message: str
) -> None:
    GOOD.check("smollm2", LAYOUT, Sharding())
    with pytest.raises(HandleError, match=message):
        GOOD.check(fingerprint, layout, sharding)


def test_layout_counts_bytes() -> None:
    layout = KVLayout(2, 3, 64, "bfloat16")
    assert layout.row_bytes == 3 * 64 * 2
    assert layout.bytes_per_token == 2 * 2 * layout.row_bytes
    assert layout.planes == 4
    assert layout.nbytes(5) == 5 * layout.bytes_per_token
    assert layout.shape(5) == (4, 5, layout.row_bytes)
