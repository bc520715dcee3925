"""Breaks text that comes in pieces between words at the terminal's edge."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PIECE = re.compile(r"\n|[^\S\n]+|\S+")


class Wrap:
    """Holds back a word until its end is known, one token later."""

    def __init__(self, width: int | None) -> None:
        """Args: width: columns of the terminal; None: there is none, and nothing is changed."""
        self._width = width
        self._column = 0
        self._held = ""
        """A word without its end yet, and the blanks before it."""

    def take(self, text: str) -> str:
        """Return what can be shown now."""
        if self._width is None:
            return text
        *whole, self._held = _PIECE.findall(self._held + text) or [""]
        if self._held.isspace() and "\n" in self._held:
            whole, self._held = [*whole, self._held], ""
        return "".join(map(self._placed, whole))

    def rest(self) -> str:
        """Return the rest, at the end."""
        held, self._held = self._held, ""
        return self._placed(held)

    def _placed(self, piece: str) -> str:
        """Place a word, a line end or blanks where they fit."""
        if piece == "\n":
            self._column = 0
            return piece
        wide = cell_len(piece)
        if self._width is None or self._column + wide <= self._width:
            self._column += wide
            return piece
        if piece.isspace():
            self._column = 0
            return "\n"
        broken = "\n" if self._column else ""
        # the terminal itself breaks a word that is longer than a line
        self._column = wide % self._width
        return broken + piece
