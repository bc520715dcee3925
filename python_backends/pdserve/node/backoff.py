"""How long to wait before the same thing is repaired once more."""

from __future__ import annotations

import math

FIRST_S = 1.0
MOST_S = 60.0
# Whatever has been well for so long after a repair is repaired at once the next time.
CALM_S = 10.0


class Backoff:
    """No pause at first, then 1 s, doubling to 60 s while one failure follows another."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._ended = -math.inf

    def pause(self, now: float) -> float:
        """Seconds to wait before a repair that is wanted ``now`` (``loop.time()``)."""
        if now - self._ended >= CALM_S:
            self._pause = 0.0
        pause = self._pause
        self._pause = min(max(FIRST_S, 2 * pause), MOST_S)
        return pause

    def ended(self, now: float) -> None:
        """A repair is over, whether it has helped or not."""
        self._ended = now
