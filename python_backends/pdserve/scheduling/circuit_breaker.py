"""Circuit breakers: what has failed is left alone for a while, then tried by one request first.

::

    CLOSED ──failed──► OPEN ──pause over──► HALF-OPEN ──good──► CLOSED
                        ▲                       │
                        └──failed, pause doubled┘

There is one for each instance, and one for each pair of instances between which a transfer failed.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_S, LONGEST_S = 0.25, 15.0
"""The first and the longest pause, in seconds; each failure that follows a trial doubles it."""


class CircuitBreaker:
    """A circuit breaker. Times are ``loop.time()`` seconds.

    Args:
        changed: called after each change.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self._pause = 0.0
        self.reopens = 0.0
        """Time from which a trial is allowed."""

    @property
    def closed(self) -> bool:
        return self._pause == 0.0

    def allows(self, now: float, trying: int) -> bool:
        """Tell whether another request may be sent while ``trying`` requests are open already."""
        return self.closed or (now >= self.reopens and not trying)

    def failed(self, now: float) -> None:
        """Note a failure.

        Failures within one pause count as one: a broken connection fails many streams.
        """
        if now >= self.reopens:
            self._pause = min(max(2 * self._pause, FIRST_S), LONGEST_S)
            self.reopens = now + self._pause
            self._changed()

    def good(self) -> None:
        if self._pause:
            self._pause = self.reopens = 0.0
            self._changed()


class RetryBudget:
    """Limits retries: ``MOST`` at once, then ``SHARE`` of a retry for each new request.

    Without it, whatever an overload makes fail would be retried and make the overload worse.
    """

    MOST, SHARE = 256.0, 0.2

    def __init__(self) -> None:
        self._left = self.MOST

    def earn(self) -> None:
        """Note that a request has arrived."""
        self._left = min(self._left + self.SHARE, self.MOST)

    def spend(self) -> bool:
        """Take one retry from the budget; False: there is none left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
