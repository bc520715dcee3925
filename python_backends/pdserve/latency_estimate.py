"""Estimates the duration of work on a number of tokens from its recent durations."""

from __future__ import annotations

# Mean and mean deviation are maintained as TCP does for its round trips (RFC 6298, section 2), with
# three deviations instead of four: of a normal distribution, 99 of 100 are within.
_MEAN, _DEVIATION, _DEVIATIONS = 1 / 8, 1 / 4, 3


class LatencyEstimate:
    """Seconds per token, for each power of two of the number of uncached tokens."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}
        """Mean and mean deviation of the seconds per token."""

    def saw(self, tokens: int, seconds: float) -> None:
        """Learn that work on ``tokens`` tokens has taken ``seconds``."""
        size, each = tokens.bit_length(), seconds / max(tokens, 1)
        mean, deviation = self._seen.get(size, (each, 0.0))
        deviation += _DEVIATION * (abs(each - mean) - deviation)
        self._seen[size] = mean + _MEAN * (each - mean), deviation

    def expected(self, tokens: int) -> float:
        """Return seconds that are hardly ever exceeded; 0 if nothing is known."""
        return self._expected(tokens, _DEVIATIONS)

    def usual(self, tokens: int) -> float:
        """Return seconds that are mostly not exceeded; 0 if nothing is known."""
        return self._expected(tokens, 1)

    def _expected(self, tokens: int, deviations: int) -> float:
        mean, deviation = self._seen.get(tokens.bit_length(), (0.0, 0.0))
        return tokens * (mean + deviations * deviation)
