"""Tests for breaking lines between words at the terminal's edge."""

from __future__ import annotations

import itertools
import re
import textwrap

from hypothesis import given
from hypothesis import strategies as st

from pdctl.wrap import Wrap

TEXT = (
    "The sky is blue because molecules of air scatter blue light more than red.\n\n"
    "- one\n- two: a-very-long-word-that-no-line-of-twenty-columns-can-hold, and more"
)


def shown(text: str, cuts: list[int], width: int | None) -> str:
    """Return what is shown of a text that comes in pieces."""
    wrap = Wrap(width)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    return "".join(map(wrap.take, pieces)) + wrap.rest()


@given(st.lists(st.integers(0, 500), max_size=60), st.integers(1, 90))
def test_no_word_is_broken_that_fits(cuts: list[int], width: int) -> None:
    found = shown(TEXT, cuts, width)
    assert found.split() == TEXT.split(), "the words and their order stay"
    for line in found.split("\n"):
        for word in re.finditer(r"\S+", line):
            fits = len(word[0]) <= width
            assert not fits or word.start() % width + len(word[0]) <= width
    assert found == shown(TEXT, [], width), "in whatever pieces it comes"


@given(st.lists(st.integers(0, 500), max_size=60), st.text(max_size=80))
def test_without_a_terminal_nothing_is_changed(cuts: list[int], text: str) -> None:
    assert shown(text, cuts, None) == text


def test_as_a_reader_would_break_it() -> None:
    line = TEXT.partition("\n")[0]
    found = [part.rstrip() for part in shown(line, [], 20).split("\n")]
    assert found == textwrap.wrap(line, 20)


def test_a_word_is_shown_as_soon_as_it_has_ended() -> None:
    wrap = Wrap(20)
    assert wrap.take("The sk") == "The "
    assert wrap.take("y is") == "sky "
    assert wrap.take("\n") == "is\n"
    assert wrap.take("wide glyphs: 日本語日本語") == "wide glyphs: "
    assert wrap.rest() == "\n日本語日本語"
