"""Tests for the torch engine against transformers' generate, on tiny random models in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pdserve.engines.protocol import DecodeSequence, PrefillJob, Tokens
from pdserve.engines.pytorch.decode import TorchDecode
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.prefill import TorchPrefill
from pdserve.errors import DeploymentError
from pdserve.sampling import Sampling
from pdserve.transfer.scatter import scatter

SMALL: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, grouped": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama, untied, multi-head": LlamaConfig(
        **SMALL, num_key_value_heads=4, tie_word_embeddings=False
    ),
    "qwen2, with biases": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3, wide heads": Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=32),
    "gpt2": GPT2Config(
        vocab_size=331,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
GREEDY = Sampling()
SEEDED = Sampling(temperature=1.1, top_p=0.95, seed=7)
FREE = Sampling(temperature=0.9)


def save(config: PretrainedConfig, path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model


@dataclass
class Pair:
    """An engine in both roles, and transformers' model with the same weights."""

    model: TorchModel
    reference: Any

    def __post_init__(self) -> None:
        self.prefill = TorchPrefill(self.model)
        self.decode = TorchDecode(self.model, 128, 16)

    def job(self, tokens: Tokens, sampling: Sampling = GREEDY) -> PrefillJob:
        return PrefillJob(tokens, self.range(len(tokens)), sampling)

    def range(self, tokens: int) -> NDArray[np.uint8]:
        layout = self.model.layout
        return np.full((layout.layers * 2, tokens, layout.row_bytes), 255, np.uint8)  # NaN

    def start(
        self, tokens: Tokens, runs: list[tuple[int, int]], sampling: Sampling
    ) -> DecodeSequence:
        job = self.job(tokens, sampling)
        sequence = DecodeSequence(tokens, self.prefill.prefill([job]), runs, sampling)
        scatter(job.kv, self.decode.pool, sequence.rows(len(tokens)))
        return sequence

    def compute(
        self,
        tokens: Tokens,
        runs: list[tuple[int, int]],
        sampling: Sampling,
        part: int = 1000,
        held: int = 0,
    ) -> DecodeSequence:
        """Compute a prompt in the decode, in parts, after the tokens that it already holds."""
        sequence = DecodeSequence(tokens, [], runs, sampling)
        for begin in range(held, len(tokens), part):
            first = self.decode.prefill(sequence, begin, min(begin + part, len(tokens)))
            assert (first is None) is (begin + part < len(tokens))
        assert first is not None
        sequence.tokens.append(first)
        return sequence

    def rows(self, sequence: DecodeSequence) -> torch.Tensor:
        """Return the K and V rows of a prompt in the decode's pool."""
        pool = torch.from_numpy(np.asarray(self.decode.pool)).view(torch.float32)
        runs = sequence.rows(len(sequence.prompt))
        return torch.cat([pool[:, first : first + rows] for first, rows in runs], 1)

    def step(self, *batch: DecodeSequence) -> None:
        for sequence, token in zip(batch, self.decode.step(batch), strict=True):
            sequence.tokens.append(token)

    def expected(self, tokens: Tokens, new: int, **options: float) -> list[int]:
        return self.all_expected([tokens], new, **options)[0]

    def all_expected(self, prompts: list[Tokens], new: int, **options: float) -> list[list[int]]:
        """Return what generate answers to prompts of one length."""
        ids = torch.from_numpy(np.stack(prompts)).long()
        output = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            **options,
        )
        answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return answers


@pytest.fixture(scope="module", params=CONFIGS)
def any_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("model")
    reference = save(CONFIGS[request.param], path)
    return Pair(TorchModel(str(path), "cpu", "float32", 1), reference)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("model")
    reference = save(CONFIGS["llama, grouped"], path)
    return Pair(TorchModel(str(path), "cpu", "float32", 1), reference)


def prompt(tokens: int, seed: int = 0) -> Tokens:
    return np.random.default_rng([tokens, seed]).integers(3, 331, tokens).astype(np.int32)


def test_what_is_known_of_a_model(pair: Pair) -> None:
    layout = pair.model.layout
    assert (layout.layers, layout.kv_heads, layout.head_dim, layout.dtype) == (3, 2, 16, "float32")
    assert pair.model.context_length == 256
    assert pair.model.vocabulary == 331
    assert pair.model.eos_ids == {2}


def test_several_prompts_in_one_forward(any_pair: Pair) -> None:
    prompts = [prompt(n) for n in (1, 17, 90, 2)]
    jobs = [any_pair.job(tokens) for tokens in prompts]
    assert any_pair.prefill.prefill(jobs) == [any_pair.expected(p, 1)[0] for p in prompts]


def test_kv_is_transformers_own(any_pair: Pair) -> None:
    tokens = prompt(33)
    job = any_pair.job(tokens)
    any_pair.prefill.prefill([job])
    cache = any_pair.reference(torch.from_numpy(tokens).long()[None]).past_key_values
    layout = any_pair.model.layout
    ours = torch.from_numpy(job.kv).view(torch.float32)
    ours = ours.view(layout.layers, 2, len(tokens), layout.kv_heads, layout.head_dim)
    for layer, stored in enumerate(ours):
        torch.testing.assert_close(stored[0].transpose(0, 1), cache.layers[layer].keys[0])
        torch.testing.assert_close(stored[1].transpose(0, 1), cache.layers[layer].values[0])


def test_planes_are_whole_when_they_are_told_to_be(any_pair: Pair) -> None:
    """Planes are complete when they are reported, so a decode may pull them during the prefill."""
    told: list[tuple[int, bytes]] = []
    jobs = [any_pair.job(prompt(n)) for n in (33, 1)]
    job = jobs[0]
    job.filled = lambda planes: told.append((planes, job.kv[:planes].tobytes()))
    any_pair.prefill.prefill(jobs)
    assert [planes for planes, _ in told] == [2, 4, 6]
    for planes, seen in told:
        assert seen == job.kv[:planes].tobytes()


@pytest.mark.parametrize("cached", [1, 16, 59])
def test_cached_prefix(any_pair: Pair, cached: int) -> None:
    tokens = prompt(60)
    whole, rest, other = any_pair.job(tokens), any_pair.job(tokens), any_pair.job(prompt(9))
    first = any_pair.prefill.prefill([whole])
    rest.kv[:, :cached] = whole.kv[:, :cached]
    rest.cached = cached
    assert any_pair.prefill.prefill([other, rest])[1:] == first
    torch.testing.assert_close(
        torch.from_numpy(rest.kv).view(torch.float32),
        torch.from_numpy(whole.kv).view(torch.float32),
        rtol=1e-4,
        atol=1e-4,
    )


def test_batch_that_sequences_join_and_leave(any_pair: Pair) -> None:
    """Sequences differ in length, runs and first step; every answer is that of generate."""
    prompts = [prompt(n) for n in (5, 40, 1, 100, 33)]
    runs = [
        [(0, 64)],
        [(64, 16), (96, 16), (80, 16), (200, 32)],
        [(300, 1), (302, 1), (304, 40)],
        [(600, 160)],
        [(500, 32), (450, 16), (900, 16)],
    ]
    running: list[DecodeSequence] = []
    ended: list[DecodeSequence] = []
    for tokens, where in zip(prompts, runs, strict=True):
        running.append(any_pair.start(tokens, where, GREEDY))
        for _ in range(3):
            any_pair.step(*running)
        if len(running) == 3:
            ended.append(running.pop(0))
    for sequence in running + ended:
        new = len(sequence.tokens)
        assert sequence.tokens == any_pair.expected(sequence.prompt, new)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
def test_prompt_computed_by_the_decode(any_pair: Pair, tokens: int) -> None:
    """Prompt lengths lie around block (16) and part (32) boundaries, in one run and in several."""
    expected = any_pair.expected(prompt(tokens), 9)
    scattered = [(1000, 16), (640, 16), (800, 48), (960, 16), (600, 32)]
    for part in (1000, 32):
        for runs in ([(0, 128)], scattered):
            sequence = any_pair.compute(prompt(tokens), runs, GREEDY, part)
            for _ in range(8):
                any_pair.step(sequence)
            assert sequence.tokens == expected


@pytest.mark.parametrize("held", [1, 32, 48, 79])
@pytest.mark.parametrize("part", [1000, 20])
def test_prompt_computed_behind_a_cached_prefix(any_pair: Pair, held: int, part: int) -> None:
    tokens = prompt(80)
    whole = any_pair.start(tokens, [(0, 128)], GREEDY)
    for runs in ([(200, 128)], [(400, 16), (480, 32), (432, 16), (528, 64)]):
        begun = DecodeSequence(tokens[:held], [], runs, GREEDY)
        scatter(any_pair.decode.pool[:, :held], any_pair.decode.pool, begun.rows(held))
        rest = any_pair.compute(tokens, runs, GREEDY, part, held)
        torch.testing.assert_close(any_pair.rows(rest), any_pair.rows(whole), rtol=1e-4, atol=1e-4)
        for _ in range(8):
            any_pair.step(rest)
        assert rest.tokens == any_pair.expected(tokens, 9)


def test_prompt_computed_among_others_writes_to_its_own_rows(pair: Pair) -> None:
    pool = np.asarray(pair.decode.pool)
    pool[:] = 7
    runs = [(96, 16), (32, 16), (64, 32)]
    pair.compute(prompt(60), runs, GREEDY, 25)
    own = {row for first, rows in runs for row in range(first, first + rows)}
    others = [row for row in range(pool.shape[1]) if row not in own]
    assert (pool[:, others] == 7).all()


@pytest.mark.parametrize("tokens", [1, 3, 4, 16, 33, 90])
def test_seeded_tokens_are_those_of_a_prefill(pair: Pair, tokens: int) -> None:
    """The tokens and every bit of K and V are equal, in one run and in several."""
    handed = pair.start(prompt(tokens), [(0, 128)], SEEDED)
    for runs in ([(336, 128)], [(496, 16), (640, 16), (560, 16), (512, 32), (720, 48)]):
        computed = pair.compute(prompt(tokens), runs, SEEDED)
        assert torch.equal(pair.rows(computed), pair.rows(handed))
        for _ in range(8):
            pair.step(computed)
        while len(handed.tokens) < 9:
            pair.step(handed)
        assert computed.tokens == handed.tokens


def test_penalties_of_a_prompt_computed_by_the_decode(pair: Pair) -> None:
    tokens = prompt(40)
    for sampling in (
        Sampling(repetition_penalty=1.7),
        Sampling(temperature=0.8, seed=3, presence_penalty=1.5, frequency_penalty=1.0),
    ):
        handed = pair.start(tokens, [(0, 64)], sampling)
        computed = pair.compute(tokens, [(64, 64)], sampling)
        for _ in range(15):
            pair.step(handed)
            pair.step(computed)
        assert computed.tokens == handed.tokens


def test_large_batches(pair: Pair) -> None:
    """Row counts that select each kind of matrix product give the same answers, in any runs."""
    sequences = [
        pair.start(prompt(9, i), [(24 * i, 3 + i % 4), (24 * i + 8, 16)], GREEDY) for i in range(60)
    ]
    expected = pair.all_expected([sequence.prompt for sequence in sequences], 6)
    for batch in (60, 48, 12, 9, 4):
        pair.step(*sequences[:batch])
    for i, sequence in enumerate(sequences):
        assert sequence.tokens == expected[i][: len(sequence.tokens)]


@pytest.mark.parametrize("company", [0, 1, 15, 16, 40])
def test_seeded_tokens_do_not_depend_on_the_batch(pair: Pair, company: int) -> None:
    """Tokens depend neither on the other sequences nor on the place in the batch or in the pool."""
    alone = pair.start(prompt(20), [(0, 64)], SEEDED)
    for _ in range(12):
        pair.step(alone)
    others = [
        pair.start(prompt(3 + i, i), [(128 + 48 * i, 48)], (FREE, GREEDY, SEEDED)[i % 3])
        for i in range(company)
    ]
    fragmented = [(127, 1), (64, 13), (80, 40)]
    among = pair.start(prompt(20), fragmented, SEEDED)
    for step in range(12):
        batch = [*others]
        batch.insert(step % (company + 1), among)
        pair.step(*batch)
        others = others[:-1] if step % 2 else others
        company = len(others)
    assert among.tokens == alone.tokens


def test_seeded_bits_do_not_depend_on_the_batch(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are equal bit for bit."""
    seen: list[torch.Tensor] = []
    forward = pair.model.forward

    def spy(*args: object) -> torch.Tensor:
        logits: torch.Tensor = forward(*args)  # type: ignore[arg-type]
        seen.append(logits)
        return logits

    monkeypatch.setattr(pair.model, "forward", spy)
    first, second = (pair.start(prompt(20), [(64 * i, 64)], SEEDED) for i in range(2))
    others = [pair.start(prompt(30 + i), [(128 + 64 * i, 64)], SEEDED) for i in range(9)]
    seen.clear()
    pair.step(first)
    pair.step(*others, second)
    assert torch.equal(seen[0][0], seen[1][9])


def test_penalties_reach_both_roles(pair: Pair) -> None:
    """Greedy decoding with a repetition penalty gives generate's tokens in both roles."""
    tokens = prompt(12)
    sequence = pair.start(tokens, [(0, 64)], Sampling(repetition_penalty=1.7))
    for _ in range(15):
        pair.step(sequence)
    assert sequence.tokens == pair.expected(tokens, 16, repetition_penalty=1.7)


def test_weights_stay_mapped(pair: Pair) -> None:
    """Processes share the weights: parameters lie in the mapped file, not in private memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in maps
        if line.endswith(".safetensors")
    ]
    parameters = [p.data_ptr() for p in pair.model._model.parameters()]
    assert all(any(address in file for file in files) for address in parameters)


def test_fingerprint_tells_models_and_layouts_apart(pair: Pair, tmp_path: Path) -> None:
    config = CONFIGS["llama, grouped"]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "a")
    save(config, tmp_path / "b")
    other = TorchModel(str(tmp_path / "a"), "cpu", "float32", 1)
    same = TorchModel(str(tmp_path / "b"), "cpu", "float32", 1)
    half = TorchModel(str(tmp_path / "b"), "cpu", "bfloat16", 1)
    prints = [m.fingerprint for m in (pair.model, other, half)]
    assert same.fingerprint == pair.model.fingerprint
    assert len(set(prints)) == 3


def test_bfloat16_runs(tmp_path: Path) -> None:
    reference = save(CONFIGS["llama, grouped"], tmp_path)
    half = Pair(TorchModel(str(tmp_path), "cpu", "bfloat16", 1), reference)
    sequence = half.start(prompt(20), [(0, 16), (32, 32)], GREEDY)
    half.step(sequence)
    assert len(sequence.tokens) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=32), "sliding_window"),
        (
            LlamaConfig(
                **SMALL,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            "dynamic",
        ),
    ],
)
def test_refused(config: PretrainedConfig, said: str, tmp_path: Path) -> None:
    save(config, tmp_path)
    with pytest.raises(DeploymentError, match=said):
        TorchModel(str(tmp_path), "cpu", "float32", 1)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="cannot be loaded"):
        TorchModel(str(tmp_path), "cpu", "float32", 1)
