"""The two kinds of requests, and what a ratio of instances can serve of a mix of them."""

from __future__ import annotations

from msgspec import Struct

from pdserve.control.ratio import best as best_of
from pdserve.control.ratio import throughput

INSTANCES = 8
SLOTS = 8
"""Slots of one decode, and so its largest batch."""
# Equal to those of perf/profiles/control.yaml.
PROMPT_TOKEN_S = 0.5e-3
STEP_S, STEP_SEQUENCE_S = 20e-3, 1.5e-3
FULL_STEP_S = STEP_S + SLOTS * STEP_SEQUENCE_S
"""Seconds of a step with a full batch."""


class Kind(Struct, frozen=True):
    """Requests of one kind: means of numbers of tokens."""

    prompt: float
    answer: float

    @property
    def prefill_s(self) -> float:
        """Return the seconds for which a prefill computes a prompt."""
        return self.prompt * PROMPT_TOKEN_S

    @property
    def decode_s(self) -> float:
        """Return the seconds for which a decode with a full batch computes an answer; its first
        token is the prefill's."""
        return (self.answer - 1) * FULL_STEP_S


A = Kind(prompt=333, answer=14.9)
"""Long prompts, short answers: 6 prompts/s of a prefill, 18 answers/s of a decode."""
B = Kind(prompt=111, answer=42.7)
"""Short prompts, long answers: 18 prompts/s of a prefill, 6 answers/s of a decode."""


def rates(weight: float) -> tuple[float, float]:
    """Return the requests per second of one full prefill and of one full decode.

    Args:
        weight: share of requests of kind B; the others are of kind A.
    """
    prefill_s = (1 - weight) * A.prefill_s + weight * B.prefill_s
    decode_s = (1 - weight) * A.decode_s + weight * B.decode_s
    return 1 / prefill_s, SLOTS / decode_s


def capacity(prefills: int, weight: float) -> float:
    """Return the requests per second that this many prefills serve, the rest being decodes: the
    smaller term of the paper's equation (1)."""
    return throughput(prefills, INSTANCES - prefills, *rates(weight))


def best(weight: float) -> int:
    """Return the number of prefills with which a mix has the largest capacity."""
    half = INSTANCES // 2
    return best_of(half, INSTANCES - half, *rates(weight))


def ratio(prefills: int) -> str:
    """Return prefills and decodes as they are written: 6:2."""
    return f"{prefills}:{INSTANCES - prefills}"
