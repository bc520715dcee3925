"""Tests for sampling: equal to transformers' own logits processors, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.engines.pytorch.sampling import Choice, distribution, penalize, sample, uniform
from pdserve.sampling import Sampling

VOCABULARY = 500


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


def choice(
    sampling: Sampling, prompt: list[int] | None = None, output: tuple[int, ...] = ()
) -> Choice:
    return Choice(sampling, np.array(prompt or [3, 4], np.int32), output)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 40, VOCABULARY + 1])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95, 1.0])
def test_distribution_is_transformers(temperature: float, top_k: int, top_p: float) -> None:
    scores = logits()
    expected = TemperatureLogitsWarper(temperature)(None, scores.double())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ids, weights = distribution(
        scores[0].numpy(), Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    )
    ours = np.zeros(VOCABULARY)
    ours[ids] = weights / weights.sum()
    np.testing.assert_allclose(ours, expected.softmax(-1)[0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    scores = logits()
    token = sample(scores, [choice(Sampling(temperature=temperature, seed=1))])[0]
    if temperature < 1:
        assert token == int(scores.argmax())
    assert 0 <= token < VOCABULARY


def test_repetition_penalty_is_transformers() -> None:
    scores = logits()
    chosen = choice(Sampling(repetition_penalty=1.3), [5, 9, 9, 17], (9, 100))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[5, 9, 9, 17, 9, 100]]), scores)
    ours = scores[0].numpy().copy()
    penalize(ours, chosen)
    np.testing.assert_array_equal(ours, expected[0].numpy())


def test_presence_and_frequency_count_the_output_alone() -> None:
    scores = np.zeros(8, np.float32)
    penalize(
        scores, choice(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1, 1], (2, 3, 3))
    )
    np.testing.assert_array_equal(scores, [0, 0, -0.75, -1, 0, 0, 0, 0])


def test_penalties_leave_the_logits_alone() -> None:
    scores = logits()
    before = scores.clone()
    sample(scores, [choice(Sampling(repetition_penalty=2.0))])
    assert torch.equal(scores, before)


def test_rows_do_not_depend_on_each_other() -> None:
    kinds = [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=20, seed=2),
        Sampling(temperature=1.4, top_p=0.9, seed=3, frequency_penalty=0.3),
    ]
    scores = logits(20)
    choices = [choice(kinds[i % 5], [3] * (i + 1), (5, 6)) for i in range(20)]
    together = sample(scores, choices)
    assert together == [sample(scores[i : i + 1], choices[i : i + 1])[0] for i in range(20)]
    assert together == sample(scores, choices)


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sampling = [Sampling(temperature=1.0, seed=seed) for seed in range(4000)]
    tokens = sample(scores.expand(4000, 4), [choice(s) for s in sampling])
    frequencies: NDArray[np.float64] = np.bincount(tokens, minlength=4) / 4000
    np.testing.assert_allclose(frequencies, scores.softmax(-1)[0].numpy(), atol=0.03)


def test_uniform_is_of_seed_and_position() -> None:
    drawn = {uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(50)}
    assert len(drawn) == 150
    assert uniform(5, 9) == uniform(5, 9)
    assert uniform(None, 9) != uniform(None, 9)
    assert all(0 <= u < 1 for u in drawn)
