"""What the instances of one role did in a window, and the rates that follow from it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

SPREAD = 0.1
"""Sizes of batches whose standard deviation is a smaller part of their mean tell too little of how
a step's time grows with its batch."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of an instance in a window, by its counters; times are in seconds."""

    completed: float = 0.0
    """Number of prompts computed by a prefill, or of answers completed by a decode."""
    busy_s: float = 0.0
    """Time in which its engine computed, without prompts that a decode computed itself."""
    slot_s: float = 0.0
    """Sum of the times for which requests held a slot."""
    steps: float = 0.0
    """Number of steps of a decode; this and what follows is 0 where the engine does not tell."""
    sequences: float = 0.0
    """Sum of the numbers of sequences in its steps."""
    sequences_squared: float = 0.0
    """Sum of their squares."""
    sequence_s: float = 0.0
    """Sum of its steps' times, each multiplied by the step's number of sequences."""

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, self._values, other._values))

    def __sub__(self, other: Work) -> Work:
        """Return what was done between two readings of the same counters."""
        return Work(*map(operator.sub, self._values, other._values))

    @property
    def plausible(self) -> bool:
        """Tell whether it can have been done: a counter that was reset makes it negative."""
        return all(0 <= value < math.inf for value in self._values)

    @property
    def _values(self) -> tuple[float, ...]:
        return (
            self.completed,
            self.busy_s,
            self.slot_s,
            self.steps,
            self.sequences,
            self.sequences_squared,
            self.sequence_s,
        )


def prefill_rate(work: Work) -> float | None:
    """Return the prompts per second of a prefill that is never idle (b_p / T_p); None: unknown.

    A forward computes as many prompts as its limit of tokens allows, so the rate while it computes
    is taken as it is.
    """
    return work.completed / work.busy_s if work.busy_s > 0 and work.completed > 0 else None


def decode_rate(work: Work, slots: int) -> float | None:
    """Return the answers per second of a decode whose slots are all used; None: unknown.

    That is b_d / T_d with b_d = ``slots``. T_d, the time for which an answer holds a slot, comes
    from Little's law: used slot-seconds by completed answers. It is corrected by the time of a step
    with a full batch over that of the steps in which the answers were made.
    """
    if work.slot_s <= 0 or work.completed <= 0:
        return None
    return slots / (work.slot_s / work.completed * _growth(work, slots))


def _growth(work: Work, full: int) -> float:
    """Return how many times longer a step takes with a batch of ``full`` than it took.

    A step takes a constant and a part that grows with its batch: the line through all steps by
    least squares, with no negative coefficient. 1 if all batches were about equal.
    """
    if work.steps <= 0 or work.sequences <= 0 or work.sequence_s <= 0:
        return 1.0
    mean = work.sequences / work.steps
    variance = work.sequences_squared / work.steps - mean**2
    if variance < (SPREAD * mean) ** 2:
        return 1.0
    step_s = work.busy_s / work.steps
    slope = max(0.0, (work.sequence_s / work.steps - mean * step_s) / variance)
    constant = max(0.0, step_s - slope * mean)
    # A sequence sees the long steps of large batches more often than a step is one of those.
    return (constant + slope * full) / (work.sequence_s / work.sequences)
