"""Sampling: the next token of each sequence, from its logits.

The order is that of transformers: penalties, temperature, top-k, top-p. Randomness comes from
(seed, position) only and each sequence is drawn separately, so a token depends neither on the batch
nor on the process that draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Choice:
    """The parameters of a token's choice, beside its logits."""

    sampling: Sampling
    prompt: NDArray[np.int32]
    output: Sequence[int]
    resumed_tokens: int = 0
    """Number of the prompt's last tokens that are output already; see ``PrefillRequest``."""

    @property
    def position(self) -> int:
        """Return the position of the token to be chosen, in prompt and output together."""
        return len(self.prompt) + len(self.output)


def sample(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """Return one token for each row of logits [n, vocabulary]."""
    greedy = [i for i, c in enumerate(choices) if c.sampling.greedy and not c.sampling.penalized]
    if len(greedy) == len(choices):
        return _ids(logits.float().argmax(-1))
    tokens = [0] * len(choices)
    if greedy:
        for i, token in zip(greedy, _ids(logits[greedy].float().argmax(-1)), strict=True):
            tokens[i] = token
    others = sorted(set(range(len(choices))) - set(greedy))
    for i, row in zip(others, logits[others].float().cpu().numpy(), strict=True):
        tokens[i] = _sample(row, choices[i])
    return tokens


def penalize(scores: NDArray[np.float32], choice: Choice) -> None:
    """Apply a row's penalties in place; each token counts once for repetition and presence."""
    sampling = choice.sampling
    begun = choice.prompt[len(choice.prompt) - choice.resumed_tokens :]
    output = np.append(begun, choice.output).astype(np.int64)
    if sampling.repetition_penalty != 1.0:
        seen = np.union1d(choice.prompt, output)
        penalty = np.float32(sampling.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    ids, counts = np.unique(output, return_counts=True)
    scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def distribution(
    scores: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that may be drawn, ascending, and their unnormalised probabilities."""
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        kth = torch.from_numpy(scores).topk(sampling.top_k).values[-1].item()
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    # The largest score is subtracted before the division: a tiny temperature must not overflow.
    weights = scores.astype(np.float64)
    weights -= scores.max()
    weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1.0:
        total = weights.sum()
        # All weights below this add up to less than the tail, and need not be sorted.
        kept = np.flatnonzero(weights >= total * (1 - sampling.top_p) / len(weights))
        ids, weights = ids[kept], weights[kept]
        descending = np.sort(weights)[::-1]
        nucleus = np.searchsorted(np.cumsum(descending), total * sampling.top_p)
        kept = weights >= descending[min(nucleus, len(descending) - 1)]
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def uniform(seed: int | None, position: int) -> float:
    """Return a number in [0, 1) that depends on (seed, position) only; random without a seed."""
    if seed is None:
        return float(np.random.default_rng().random())
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _sample(scores: NDArray[np.float32], choice: Choice) -> int:
    sampling = choice.sampling
    if sampling.penalized:
        penalize(scores, choice)
    if sampling.greedy:
        return int(scores.argmax())
    ids, weights = distribution(scores, sampling)
    cumulative = np.cumsum(weights)
    drawn = uniform(sampling.seed, choice.position) * cumulative[-1]
    return int(ids[min(np.searchsorted(cumulative, drawn, side="right"), len(ids) - 1)])


def _ids(tokens: Tensor) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids
