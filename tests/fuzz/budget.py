"""How much random input is made."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hypothesis import HealthCheck, Phase, given, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

T = TypeVar("T")


class _Spent(BaseException):
    """Hypothesis takes an ``Exception`` for a failure of the example, and would shrink it."""


@dataclass(frozen=True)
class Budget:
    """Ends with whichever comes first, but never before the fewest inputs that say anything."""

    count: int
    seconds: float

    def spend(self, inputs: SearchStrategy[T], use: Callable[[T], int], fewest: int = 1) -> int:
        """Feed random examples; how many inputs were made of them.

        Args:
            use: feeds one example, fails if it must not be so, and says how many inputs it was.
            fewest: inputs that are made even where a slow machine takes longer for them.
        """
        until, made = time.monotonic() + self.seconds, 0

        @settings(
            max_examples=self.count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def feed(example: T) -> None:
            nonlocal made
            if made >= self.count or (made >= fewest and time.monotonic() >= until):
                raise _Spent
            made += use(example)

        with contextlib.suppress(_Spent):
            feed()
        return made
