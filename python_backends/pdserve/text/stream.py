"""Incremental conversion of token ids to text: one answer, cut at its stop strings."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.pre_tokenizers import ByteLevel

from pdserve.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pdserve.text.vocabulary import Vocabulary


class TextStream:
    """The text of one answer, pushed as ids and returned as text that is final.

    The results of ``push`` and ``finish`` add up to ``Vocabulary.decode`` of all ids, however they
    were split into pushes, or to its part before a stop string. Stop strings are searched in the
    text with its special tokens, which are never shown. The stop string that *ends* first counts
    (no later token could change that, so the engine may stop at once), and the longest of those
    that end there. A special token within a character of several tokens is placed before it.

    Not thread-safe. Raises InvalidRequest if a stop string is empty.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            at = list(stop).index("")
            raise InvalidRequest(f"stop_words[{at}] is empty; at least 1 character is needed")
        self.stopped = False
        """True if a stop string was found, before which the answer has ended."""
        self.tokens_used = 0
        """Number of ids of the answer so far, up to the one that completed a stop string."""
        self._special = vocabulary.special
        self._decoder = _Bytes(vocabulary) if vocabulary.byte_level else _Pieces(vocabulary)
        self._stop = tuple(stop)
        self._first = re.compile("|".join(re.escape(c) for c in {word[0] for word in stop}))
        self._held: list[_Part] = []
        self._ended = False

    @property
    def settled(self) -> bool:
        """Tell whether nothing is held back: all text of the ids so far has been returned."""
        return not self._held and self._decoder.settled

    @property
    def needed(self) -> list[int]:
        """Return the ids so far that later text depends on, where nothing is held back."""
        return self._decoder.needed

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that has become final with these ids; often it is empty.

        The bytes of an incomplete character are held back, and the longest end of the text that may
        be the beginning of a stop string. Ids after a stop string are ignored.

        Raises:
            RuntimeError: the answer has ended, by a stop string or by ``finish``.
        """
        if self._ended:
            raise RuntimeError("push after the end of the answer")
        texts = []
        for token_id in ids:
            self.tokens_used += 1
            special = self._special(token_id)
            if special is None:
                texts.append(self._release(self._decoder.step(token_id)))
            elif self._stop:
                texts.append(self._after(_Part(special, False)))
            if self.stopped:
                break
        return "".join(texts)

    def finish(self) -> str:
        """Return the text that was held back, since no ids follow. Empty after a stop string."""
        if self._ended:
            return ""
        text = self._release(self._decoder.finish())
        text += "".join(part.text for part in self._held if part.shown)
        self._ended = True
        return text

    def _after(self, special: _Part) -> str:
        """Release text around a special token.

        Held-back text may end before the token, or continue.
        """
        pending = self._decoder.pending()
        if self._find(_joined([*self._held, *pending, special])) is not None:
            return self._release([*pending, special])
        return self._release(self._decoder.within(special))

    def _release(self, new: list[_Part]) -> str:
        """Return the shown part of the text so far that no stop string can include any more."""
        if not self._stop:
            return _joined(part for part in new if part.shown)
        self._held += (part for part in new if part.text)
        if not self._held:
            return ""
        text = _joined(self._held)
        found = self._find(text)
        cut = self._open_end(text) if found is None else found
        shown, held = [], []
        for part in self._held:
            if part.shown:
                shown.append(part.text[: max(cut, 0)])
            if len(part.text) > cut:
                held.append(_Part(part.text[max(cut, 0) :], part.shown))
            cut -= len(part.text)
        self._held = held
        if found is not None:
            self._held = []
            self.stopped = self._ended = True
        return "".join(shown)

    def _find(self, text: str) -> int | None:
        """Return the start of the stop string that ends first; None: there is none."""
        ends = [
            (start + len(word), start) for word in self._stop if (start := text.find(word)) >= 0
        ]
        return min(ends)[1] if ends else None

    def _open_end(self, text: str) -> int:
        """Return the start of the longest end of the text that a stop string begins with."""
        for found in self._first.finditer(text):
            tail = text[found.start() :]
            if any(word.startswith(tail) for word in self._stop):
                return found.start()
        return len(text)


class _Part(NamedTuple):
    """A part of the text in which stop strings are searched."""

    text: str
    shown: bool


def _joined(parts: Iterable[_Part]) -> str:
    return "".join(part.text for part in parts)


# ``tokenizers.decoders.DecodeStream`` fails on a byte token that invalidates the run before it,
# does not return an incomplete character at the end, and decodes all held-back ids at every step.


class _Bytes:
    """A byte-level vocabulary: tokens are bytes, and the answer is their UTF-8 text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.needed: list[int] = []
        self._token = vocabulary.token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def settled(self) -> bool:
        return not self._utf8.getstate()[0]

    def step(self, token_id: int) -> list[_Part]:
        token = self._token(token_id)
        if token is None:
            return []
        try:
            data = bytes([_BYTES[char] for char in token])
        except KeyError:  # an added token that is no byte sequence is literal text
            data = token.encode()
        return [_Part(self._utf8.decode(data), True)]

    def within(self, special: _Part) -> list[_Part]:
        """Place a special token here; return the text that is known with it."""
        return [special]

    def pending(self) -> list[_Part]:
        """Return what ``finish`` would return now."""
        return [_Part(self._utf8.getstate()[0].decode(errors="replace"), True)]

    def finish(self) -> list[_Part]:
        return [_Part(self._utf8.decode(b"", final=True), True)]


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 is its own byte, the rest start at U+0100."""
    printable = set(ByteLevel.alphabet())
    rest = (byte for byte in range(256) if chr(byte) not in printable)
    own = {chr(byte): byte for byte in range(256) if chr(byte) in printable}
    return own | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


class _Pieces:
    """Any other vocabulary: a token is a piece of text that depends at most on the previous one.

    The tokenizer decodes a run of byte tokens (``<0xE4>``) as a whole, and one bad byte invalidates
    all of it: such a run can only be shown once it has ended.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.needed: list[int] = []
        """The last id before the run, if there is any."""
        self._run: list[int] = []
        self._within: list[tuple[int, _Part]] = []
        """Special tokens, each with the number of the run's ids before it."""

    @property
    def settled(self) -> bool:
        return not self._run

    def step(self, token_id: int) -> list[_Part]:
        token = self._vocabulary.token(token_id)
        if token is None:
            return []
        self._run.append(token_id)
        if len(token) == 6 and token.startswith("<0x"):
            return []
        return self.finish()

    def within(self, special: _Part) -> list[_Part]:
        """Place a special token here; return the text that is known with it."""
        if not self._run:
            return [special]
        self._within.append((len(self._run), special))
        return []

    def pending(self) -> list[_Part]:
        """Return what ``finish`` would return now."""
        text = self._text(self._run)
        parts, at = [], 0
        for count, special in self._within:
            before = self._text(self._run[:count])
            end = max(at, len(before)) if text.startswith(before) else at
            parts += [_Part(text[at:end], True), special]
            at = end
        return [*parts, _Part(text[at:], True)]

    def finish(self) -> list[_Part]:
        parts = self.pending()
        if self._run:
            self.needed, self._run, self._within = self._run[-1:], [], []
        return parts

    def _text(self, run: list[int]) -> str:
        """Return the text that a run adds to the text before it."""
        if not run:
            return ""
        before = self._vocabulary.decode(self.needed)
        return self._vocabulary.decode(self.needed + run)[len(before) :]
