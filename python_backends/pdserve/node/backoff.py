"""The pause before the same thing is repaired again."""

from __future__ import annotations

import math

FIRST_S = 1.0
MOST_S = 60.0
# Seconds of health after a repair, after which the next repair is done at once.
CALM_S = 10.0


class Backoff:
    """Pauses between repairs: none at first, then 1 s, doubled by each failure up to 60 s."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._ended = -math.inf
        self.tries = 0
        """Repairs since it was last healthy for CALM_S."""

    def pause(self, now: float) -> float:
        """Return the seconds to wait before a repair that is needed ``now`` (``loop.time()``)."""
        if now - self._ended >= CALM_S:
            self._pause, self.tries = 0.0, 0
        self.tries += 1
        pause = self._pause
        self._pause = min(max(FIRST_S, 2 * pause), MOST_S)
        return pause

    def ended(self, now: float) -> None:
        """Note that a repair has ended, successfully or not."""
        self._ended = now
