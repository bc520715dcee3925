"""Prompts of a known number of tokens."""

from __future__ import annotations

import random

# Each word is one token of the default model's vocabulary, first or after a space.
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from "
    "or one had by word but not what all were we when your can said there use an each which she "
    "do how their if will up other about out many then them these so some her would make like "
    "him into time has look two more write go see number no way could people my than first water "
    "been call who its now find long down day did get come made may part"
)
WORDS = _TEXT.split()


def prompts(count: int, tokens: int, seed: int) -> list[str]:
    """Return ``count`` prompts of ``tokens`` random words each, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=tokens)) for _ in range(count)]
