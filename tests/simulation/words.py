"""A vocabulary for the emulated model: short words, and single bytes of characters."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel

from pdserve.text.stream import _BYTES
from pdserve.text.vocabulary import Vocabulary
from tests.unit.inprocess import EOS, VOCABULARY

FIRST = "ABCD"
"""Each word begins with one of these letters, which are nowhere else in it."""
BYTES = range(8, 8 + 93)
"""The ids of single bytes: the first and the last bytes of characters that have two."""
SPECIAL = "</s>"
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


@cache
def read() -> Vocabulary:
    """Make the vocabulary."""
    words = {_word(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=_word(0)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return Vocabulary(tokenizer)


def is_word(token: int) -> bool:
    """Return whether a token consists of whole characters that an answer shows."""
    return token != EOS and token not in BYTES


def _word(number: int) -> str:
    if number == EOS:
        return SPECIAL
    if number in BYTES:
        return _CHARACTERS[[*range(0xC3, 0xE0), *range(0x80, 0xC0)][number - BYTES[0]]]
    first, rest = FIRST[number % len(FIRST)], number // len(FIRST)
    return first + chr(ord("a") + rest // 26) + chr(ord("a") + rest % 26)
