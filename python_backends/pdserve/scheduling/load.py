"""The load of an instance by one gateway."""

from __future__ import annotations

from collections.abc import Callable


class Load:
    """The calls of this gateway that are open at an instance, and when it was asked last.

    Args:
        changed: called after each change.
    """

    __slots__ = ("_changed", "asked", "computed", "offers", "open", "refused", "share", "tokens")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self.open = 0
        """Number of open calls, which hold something there or wait for it."""
        self.offers = 0
        """Number of open calls that the instance has not answered."""
        self.computed = 0
        """Number of open calls that wait for nothing but a decode."""
        self.tokens = 0
        """Number of prompt tokens that it is computing, cached ones left out."""
        self.share = 1.0
        """The part of the others' load with which it counts as equally loaded; see ``ramp``."""
        self.asked = self.refused = 0.0
        """Time of the last offer, and of the last refusal as busy (``loop.time()``)."""

    def add(self, calls: int, computed: int = 0) -> None:
        """Add open calls, and calls that only wait for a decode; negative numbers take them off."""
        self.open += calls
        self.computed += computed
        self._changed()

    def add_tokens(self, tokens: int) -> None:
        """Add prompt tokens to be computed; a negative number takes them off."""
        self.tokens += tokens
        self._changed()

    def give_share(self, share: float) -> None:
        """Change its share, above 0 and at most 1."""
        self.share = share
        self._changed()

    def offer(self, now: float) -> None:
        """Note that something is offered; ``answer`` follows."""
        self.offers += 1
        self.asked = now
        self._changed()

    def answer(self) -> None:
        """Note that an offer has been answered or has failed."""
        self.offers -= 1
        self._changed()

    def refuse(self, now: float) -> None:
        """Note that the instance has refused an offer as busy."""
        self.refused = now
        self._changed()


def prefill_load(load: Load) -> float:
    """Return a prefill's load: the tokens that it computes for this gateway, then open calls."""
    return (load.tokens + load.open / (load.open + 1)) / load.share


def decode_load(load: Load) -> float:
    """Return a decode's load: its open streams."""
    return load.open / load.share
