"""Tests for sealed messages to an instance: what is accepted, what is refused, what is logged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.control.assignment import ANY, FIRST
from pdserve.rpc import seal
from pdserve.rpc.seal import MAC_BYTES, Refusals, Seal, Unsealed

KEY, OTHER_KEY = bytes(32), b"\1" + bytes(31)
MOST = 1000
MESSAGE = b"any message"
WORDS = str(Unsealed())


def opened(data: bytes, key: bytes = KEY, instance: str = "prefill_0") -> tuple[int, bytes]:
    number, message = Seal(key, instance).open(memoryview(data), MOST)
    return number, bytes(message)


@given(st.binary(max_size=MOST), st.sampled_from([ANY, FIRST, 7, (1 << 63) - 1]))
def test_a_sealed_message_is_opened_with_its_number(message: bytes, number: int) -> None:
    assert opened(Seal(KEY, "prefill_0").close(message, number)) == (number, message)


@given(st.data(), st.binary(min_size=1, max_size=40))
def test_an_altered_message_is_not_opened(data: st.DataObject, message: bytes) -> None:
    sealed = bytearray(Seal(KEY, "prefill_0").close(message, FIRST))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Unsealed):
        opened(bytes(sealed))


@pytest.mark.parametrize(
    ("data", "key", "instance"),
    [
        (b"", KEY, "prefill_0"),
        (bytes(MAC_BYTES), KEY, "prefill_0"),
        (MESSAGE, KEY, "prefill_0"),
        (bytes(MAC_BYTES) + MESSAGE, KEY, "prefill_0"),
        (Seal(KEY, "prefill_0").close(MESSAGE, FIRST)[:-1], KEY, "prefill_0"),
        (Seal(KEY, "prefill_0").close(MESSAGE, FIRST) + b"\0", KEY, "prefill_0"),
        (Seal(KEY, "prefill_0").close(MESSAGE, FIRST), OTHER_KEY, "prefill_0"),
        (Seal(KEY, "prefill_0").close(MESSAGE, FIRST), KEY, "prefill_1"),
        (Seal(KEY, "prefill_0").close(bytes(MOST + 1), FIRST), KEY, "prefill_0"),
    ],
)
def test_invalid_messages_are_refused_with_the_same_error(
    data: bytes, key: bytes, instance: str
) -> None:
    with pytest.raises(Unsealed) as refused:
        opened(data, key, instance)
    assert str(refused.value) == WORDS
    assert "prefill" not in WORDS


def test_refusals_are_logged_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("pdserve.rpc.seal.time.monotonic", lambda: now)
    refusals = Refusals()
    first = refusals.refused("prefill_0")
    assert first is not None
    assert "prefill_0: 1 message" in first
    assert "key_file" in first
    assert [refusals.refused("prefill_0") for _ in range(100)] == [None] * 100
    now += seal.LOG_EVERY_S
    later = refusals.refused("prefill_0")
    assert later is not None
    assert "prefill_0: 101 messages" in later
