"""What one gateway has at an instance."""

from __future__ import annotations

from collections.abc import Callable


class Load:
    """The calls of this gateway that are open at an instance, and when it was asked last.

    Args:
        changed: called after each change.
    """

    __slots__ = ("_changed", "asked", "computed", "offers", "open", "refused", "tokens")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self.open = 0
        """Calls that hold, or wait for, something there."""
        self.offers = 0
        """Of them, those that it has not answered."""
        self.computed = 0
        """Of them, those that wait for nothing but a decode."""
        self.tokens = 0
        """Prompt tokens that it is computing, cached ones left out."""
        self.asked = self.refused = 0.0
        """When something was offered last, and when it was busy last (``loop.time()``)."""

    def add(self, calls: int, computed: int = 0) -> None:
        """So many calls have been opened, or wait only for a decode now; negative: no longer."""
        self.open += calls
        self.computed += computed
        self._changed()

    def add_tokens(self, tokens: int) -> None:
        """So many prompt tokens are to be computed; a negative number: no longer."""
        self.tokens += tokens
        self._changed()

    def offer(self, now: float) -> None:
        """Something is offered; ``answer`` follows."""
        self.offers += 1
        self.asked = now
        self._changed()

    def answer(self) -> None:
        """An offer has been answered, or has failed."""
        self.offers -= 1
        self._changed()

    def refuse(self, now: float) -> None:
        """It has said that it is busy."""
        self.refused = now
        self._changed()
