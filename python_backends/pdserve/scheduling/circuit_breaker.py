"""What has failed is left alone for a while, and tried by one request before others follow.

::

    CLOSED ──failed──► OPEN ──pause over──► HALF-OPEN ──good──► CLOSED
                        ▲                       │
                        └──failed, pause doubled┘

Of an instance, and of a pair of them that could not hand over.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_S, LONGEST_S = 0.25, 15.0
"""The pause: doubled by each failure that follows a trial."""


class CircuitBreaker:
    """Times are ``loop.time()`` seconds.

    Args:
        changed: called after each change.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._pause = 0.0
        self.reopens = 0.0
        """When a trial is allowed."""

    @property
    def closed(self) -> bool:
        return self._pause == 0.0

    def allows(self, now: float, trying: int) -> bool:
        """Whether one more may try while ``trying`` do already."""
        return self.closed or (now >= self.reopens and not trying)

    def failed(self, now: float) -> None:
        """Many failures in one pause are one: a stream each of the same broken connection."""
        if now >= self.reopens:
            self._pause = min(max(2 * self._pause, FIRST_S), LONGEST_S)
            self.reopens = now + self._pause
            self._changed()

    def good(self) -> None:
        if self._pause:
            self._pause = self.reopens = 0.0
            self._changed()


class RetryBudget:
    """How often requests may be tried again: some at once, then one for so many that are new.

    Without it, all that an overload makes fail would be asked for a second time, and make it worse.
    """

    MOST, SHARE = 256.0, 0.2

    def __init__(self) -> None:
        self._left = self.MOST

    def earn(self) -> None:
        """A request has come."""
        self._left = min(self._left + self.SHARE, self.MOST)

    def spend(self) -> bool:
        """Whether one more may be tried again."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
