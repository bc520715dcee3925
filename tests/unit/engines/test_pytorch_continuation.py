"""Tests for continuing an answer that another pair began: the tokens must be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pdserve.engines.protocol import DecodeSequence, PrefillJob, Tokens
from pdserve.engines.pytorch.model import TorchModel
from pdserve.sampling import Sampling
from pdserve.transfer.scatter import scatter
from tests.unit.engines.test_pytorch import CONFIGS, FREE, GREEDY, SEEDED, Pair, prompt, save

KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "seeded, top-k": Sampling(temperature=0.8, top_k=20, seed=11),
    "greedy, penalties": Sampling(
        repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.4
    ),
    "seeded, penalties": Sampling(
        temperature=1.2, seed=5, repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=0.7
    ),
}
NEW = 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("model")
    reference = save(CONFIGS["llama, grouped"], path)
    return Pair(TorchModel(str(path), "cpu", "float32", 1), reference)


def begun(
    pair: Pair, tokens: Tokens, resumed_tokens: int, sampling: Sampling
) -> tuple[DecodeSequence, PrefillJob]:
    """Return a decode's sequence and the prefill's result; the last prompt tokens are output."""
    job = pair.job(tokens, sampling)
    job.resumed_tokens = resumed_tokens
    first = pair.prefill.prefill([job])
    runs = [(100, 7), (200, 300)]
    sequence = DecodeSequence(tokens, first, runs, sampling, resumed_tokens=resumed_tokens)
    scatter(job.kv, pair.decode.pool, sequence.rows(len(tokens)))
    return sequence, job


def stepped(pair: Pair, sequence: DecodeSequence, tokens: int) -> list[int]:
    while len(sequence.tokens) < tokens:
        pair.step(sequence)
    return sequence.tokens


def cut(tokens: Tokens, answer: list[int], where: int) -> Tokens:
    return np.append(tokens, np.array(answer[:where], np.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_goes_on_with_the_same_tokens(pair: Pair, kind: str) -> None:
    sampling, tokens = KINDS[kind], prompt(37)
    answer = stepped(pair, begun(pair, tokens, 0, sampling)[0], NEW)
    assert len(set(answer)) > 5
    for where in range(1, NEW):
        sequence, _ = begun(pair, cut(tokens, answer, where), where, sampling)
        assert stepped(pair, sequence, min(NEW - where, 3)) == answer[where : where + 3]


def test_cut_again_and_again(pair: Pair) -> None:
    """Each part is computed by another pair; `resumed_tokens` counts all tokens sent so far."""
    sampling, tokens = KINDS["seeded, penalties"], prompt(20)
    expected = stepped(pair, begun(pair, tokens, 0, sampling)[0], NEW)
    answer: list[int] = []
    for more in (1, 2, 16, 17, 5, NEW):
        where = len(answer)
        sequence, _ = begun(pair, cut(tokens, answer, where), where, sampling)
        answer += stepped(pair, sequence, min(more, NEW - where))
    assert answer == expected


def test_outputs_matter(pair: Pair) -> None:
    """Resumed tokens count as output: prompt tokens would not be penalized."""
    sampling, tokens = KINDS["greedy, penalties"], prompt(37)
    answer = stepped(pair, begun(pair, tokens, 0, sampling)[0], NEW)
    different = [
        stepped(pair, begun(pair, cut(tokens, answer, where), 0, sampling)[0], 1)[0]
        != answer[where]
        for where in range(1, NEW)
    ]
    assert any(different)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", [1, 15, 16, 17, 40])
def test_reproducible_kv_has_the_bits_it_had(dtype: str, where: int, tmp_path: Path) -> None:
    """Rounding must not change a token that was drawn close to the edge of its probability."""
    reference = save(CONFIGS["llama, grouped"], tmp_path)
    pair = Pair(TorchModel(str(tmp_path), "cpu", dtype, 1), reference)
    tokens = prompt(37)
    sequence, _ = begun(pair, tokens, 0, SEEDED)
    answer = stepped(pair, sequence, where + 1)
    had = rows(pair, sequence, len(tokens) + where)
    other = Pair(pair.model, reference)
    again, job = begun(other, cut(tokens, answer, where), where, SEEDED)
    assert torch.equal(rows(other, again, len(tokens) + where), had)
    assert torch.equal(torch.from_numpy(job.kv), had)
    assert again.tokens == answer[where:]
    runs = [(800, 16), (848, 48), (832, 16), (900, 20)]
    local = DecodeSequence(again.prompt, [], runs, SEEDED, resumed_tokens=where)
    assert other.decode.prefill(local, 0, len(again.prompt)) == again.tokens[0]
    assert torch.equal(rows(other, local, len(tokens) + where), had)


def rows(pair: Pair, sequence: DecodeSequence, tokens: int) -> torch.Tensor:
    """Return the bytes of a sequence's K and V."""
    pool = torch.from_numpy(pair.decode.pool)
    return torch.cat([pool[:, first : first + n] for first, n in sequence.rows(tokens)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_that_computes_the_prompt_itself(pair: Pair, kind: str) -> None:
    """The answer of such a decode is the same, in one run of rows and in several."""
    sampling, tokens = KINDS[kind], prompt(37)
    answer = stepped(pair, begun(pair, tokens, 0, sampling)[0], 40)
    for where in (1, 16, 30):
        for runs in ([(600, 128)], [(800, 16), (848, 48), (832, 16), (900, 20)]):
            told = cut(tokens, answer, where)
            sequence = DecodeSequence(told, [], runs, sampling, resumed_tokens=where)
            first = pair.decode.prefill(sequence, 0, len(told))
            assert first is not None
            sequence.tokens.append(first)
            assert stepped(pair, sequence, 8) == answer[where : where + 8]


def test_planes_of_a_continuation_are_told(pair: Pair) -> None:
    told: list[int] = []
    job = pair.job(prompt(40), SEEDED)
    job.resumed_tokens, job.filled = 9, told.append
    pair.prefill.prefill([job])
    assert told == [6]


def test_where_no_reproducibility_was_asked_for(pair: Pair) -> None:
    """Several continuations share a forward, and some of them use a cached prefix."""
    prompts = [prompt(n) for n in (50, 40)]
    whole = pair.job(prompts[0])
    pair.prefill.prefill([whole])
    jobs: list[Any] = [pair.job(tokens) for tokens in prompts]
    jobs[0].kv[:, :32], jobs[0].cached = whole.kv[:, :32], 32
    jobs[0].resumed_tokens, jobs[1].resumed_tokens, jobs[1].sampling = 30, 12, FREE
    first, _ = pair.prefill.prefill(jobs)
    assert first == pair.expected(prompts[0], 1)[0]
