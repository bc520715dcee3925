"""Prompts of several kinds, from one token to thousands; the same for the same seed."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WORDS = """
    the of and to in is that it was for on as with be by at from this are or an which river
    mountain engine question answer because slowly never seventeen colour light machine memory
    children language water history number system between without music window paper garden
""".split()  # noqa: SIM905
_NAMES = "count total items node value result left right cache index user path buffer".split()  # noqa: SIM905
_CODE = (
    "def {a}({b}, {c}=None):\n    return {b}[{n}:] + {c}\n",
    "for {a} in range({n}):\n    if {a} % {m} == 0:\n        {b}.append({a} ** 2)\n",
    'class {a}:\n    """Holds {b}."""\n    def __init__(self) -> None:\n        self.{c} = {n}\n',
    "SELECT {a}, COUNT(*) FROM {b} WHERE {c} > {n} GROUP BY {a};\n",
    '{{"{a}": [{n}, {m}], "{b}": {{"{c}": null}}}}\n',
    "for (int {a} = 0; {a} < {n}; ++{a}) {{ *{b}++ = {c}[{a}] & 0x{m:x}; }}\n",
)
_CJK = (
    "今天天气很好。",
    "人工智能正在改变世界，",  # noqa: RUF001
    "東京の桜は美しいです。",
    "カタカナとひらがな",
    "안녕하세요, 오늘은 ",
    "서울의 날씨가 ",
    "請問這個多少錢？",  # noqa: RUF001
)
_EMOJI = ("😀", "🎉", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇯🇵", "❤️", "🧑‍🚀", "🫠", "1️⃣", " ok ", " and ")
_SPACE = (" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000", " a ", "\n- ")
_PREAMBLE = (
    "You are the assistant of a public library. Answer in one short sentence. Name the shelf when "
    "a book is asked for, and the opening hours when somebody asks about them. The library is open "
    "from nine to six on weekdays, from ten to two on Saturdays, and closed on Sundays. Never "
    "recommend a book that is lent out. If you do not know something, say so, and send the reader "
    "to the desk on the ground floor. Be kind to children.\n\nReader: "
)


@dataclass(frozen=True)
class Prompt:
    name: str
    """Number, kind and length, for test output: ``017-emoji-84``."""
    text: str
    ids: tuple[int, ...]


def corpus(
    encode: Callable[[str], list[int]], count: int, longest: int, seed: int = 1
) -> list[Prompt]:
    """Return ``count`` prompts whose lengths are even on a logarithmic scale.

    The shortest has 1 token, and the last ``longest`` or a few less.
    """
    rng = random.Random(seed)
    prompts = []
    for number, kind in zip(range(count), itertools.cycle(_KINDS), strict=False):
        share = {0: 0.0, count - 1: 1.0}.get(number, rng.random())
        text = _text(encode, _KINDS[kind](rng), round(math.exp(share * math.log(longest))))
        ids = tuple(encode(text))
        prompts.append(Prompt(f"{number:03}-{kind}-{len(ids)}", text, ids))
    return prompts


def _text(encode: Callable[[str], list[int]], pieces: Iterator[str], tokens: int) -> str:
    """Return as many pieces, then as many characters of the next, as fit into ``tokens`` tokens."""
    parts = list(itertools.islice(pieces, tokens + 1))

    def too_long(text: str) -> bool:
        return len(encode(text)) > tokens

    whole = bisect_left(range(len(parts)), True, key=lambda n: too_long("".join(parts[: n + 1])))
    head, rest = "".join(parts[:whole]), parts[whole] if whole < len(parts) else ""
    cut = bisect_left(range(len(rest)), True, key=lambda n: too_long(head + rest[: n + 1]))
    return head + rest[:cut] or "a"


def _english(rng: random.Random) -> Iterator[str]:
    while True:
        words = rng.choices(_WORDS, k=rng.randint(4, 14))
        yield words[0].capitalize()
        yield from (f" {word}" for word in words[1:])
        yield rng.choice((". ", "? ", ", but ", ".\n"))


def _code(rng: random.Random) -> Iterator[str]:
    while True:
        a, b, c = rng.sample(_NAMES, 3)
        line = rng.choice(_CODE)
        yield line.format(a=a, b=b, c=c, n=rng.randint(0, 999), m=rng.randint(1, 255))


def _cjk(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(_CJK) if rng.random() < 0.5 else chr(rng.randint(0x4E00, 0x9FA5))


def _emoji(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(_EMOJI)


def _space(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(_SPACE)


def _prefix(rng: random.Random) -> Iterator[str]:
    """Return a prompt of the kind that all share a beginning."""
    yield _PREAMBLE
    yield from _english(rng)


def _mixed(rng: random.Random) -> Iterator[str]:
    kinds = [_english(rng), _code(rng), _cjk(rng), _emoji(rng), _space(rng)]
    while True:
        yield from itertools.islice(rng.choice(kinds), rng.randint(1, 8))


_KINDS = {
    "english": _english,
    "code": _code,
    "cjk": _cjk,
    "emoji": _emoji,
    "space": _space,
    "prefix": _prefix,
    "mixed": _mixed,
}
