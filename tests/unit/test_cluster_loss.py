"""Only a watchdog of the deployment may say that an instance is lost, and once for each time."""

from __future__ import annotations

import pytest

from pdserve.cluster.loss import FRESH_S, Losses, Lost, told
from pdserve.errors import InvalidRequest

KEY, NOW = b"k" * 32, 1e9


def test_what_is_said_is_heard_once() -> None:
    losses = Losses(KEY)
    text = told(Lost("decode_0", NOW), KEY)
    assert losses.heard(text, NOW + 1) == "decode_0"
    with pytest.raises(InvalidRequest, match=r"lost: decode_0: said 2\.0 s ago, or before"):
        losses.heard(text, NOW + 2)
    assert losses.heard(told(Lost("decode_1", NOW), KEY), NOW + 2) == "decode_1"
    assert losses.heard(told(Lost("decode_0", NOW + 3), KEY), NOW + 3) == "decode_0"


def test_what_was_said_before_is_heard_no_more() -> None:
    losses = Losses(KEY)
    losses.heard(told(Lost("decode_0", NOW), KEY), NOW)
    with pytest.raises(InvalidRequest, match="or before"):
        losses.heard(told(Lost("decode_0", NOW - 1), KEY), NOW)


@pytest.mark.parametrize("late", [FRESH_S, -FRESH_S, float("nan")])
def test_what_is_not_of_this_moment_is_refused(late: float) -> None:
    with pytest.raises(InvalidRequest, match="lost: decode_0: said"):
        Losses(KEY).heard(told(Lost("decode_0", NOW - late), KEY), NOW)


@pytest.mark.parametrize(
    "text",
    [
        "decode_0",
        "",
        "not base64!",
        "ü",
        told(Lost("decode_0", NOW), b"another key, as long as 32 bytes"),
        told(Lost("decode_0", NOW), KEY)[:-8],
    ],
)
def test_what_anybody_could_say_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="lost: only a watchdog of this deployment"):
        Losses(KEY).heard(text, NOW)
