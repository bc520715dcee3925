"""The parts of an answer as ids that can be decoded one part at a time, without a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pdserve.text.stream import TextStream
    from pdserve.text.vocabulary import Vocabulary


class Excerpt(NamedTuple):
    """The text of a part: ``before``, then ``Vocabulary.decode(ids)[start:end]``."""

    before: str
    """Text that is in no ids, such as an echoed prompt."""
    ids: list[int]
    start: int
    end: int


class Excerpts:
    """The parts of one answer, made beside the ``TextStream`` that finds where each part ends.

    A part's own ids are not enough to decode it. Its first character may have begun with ids of an
    earlier part, text of earlier ids may have been held back, since it might have become a stop
    string, and some tokens have another text at the beginning. So the ids of an excerpt begin where
    the stream held nothing back for the last time.
    """

    def __init__(self, vocabulary: Vocabulary, stream: TextStream) -> None:
        self._vocabulary = vocabulary
        self._stream = stream
        self._ids: list[int] = []
        """Ids since the stream held nothing back, after those that their text depends on."""
        self._told = 0
        """Number of characters of their text that are in earlier parts."""

    def part(self, before: str, ids: list[int], text: str) -> Excerpt:
        """Return the excerpt of the next part of the answer.

        Args:
            before: text that is in no ids.
            ids: the ids that were pushed to the stream since the part before.
            text: what the stream returned for them.
        """
        end = self._told + len(text)
        excerpt = Excerpt(before, self._ids + ids, self._told, end)
        if self._stream.settled:
            self._ids = self._stream.needed
            self._told = len(self._vocabulary.decode(self._ids)) if self._ids else 0
        else:
            self._ids, self._told = excerpt.ids, end
        return excerpt
