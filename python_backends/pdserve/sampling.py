"""The sampling parameters, by which the next token is chosen."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Sampling(Struct, frozen=True, array_like=True):
    """Sampling parameters; greedy by default, in the ranges of a client's request.

    Penalties are those of OpenAI's API (presence, frequency: over the output) and of transformers
    (repetition: over prompt and output).
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    """A seed has 64 bits; None: the tokens are drawn at random."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reproducible(self) -> bool:
        """Tell whether a seed was given: tokens may not depend on what else is computed."""
        return not self.greedy and self.seed is not None

    @property
    def penalized(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
