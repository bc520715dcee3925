"""Tests for the emulated engine: its profile, its timing, and its predictable tokens."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pdserve.engines.emulated import EmulatedModel
from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.errors import DeploymentError
from pdserve.sampling import Sampling
from tests.unit.inprocess import EOS, VOCABULARY, Site, model, virtual

if TYPE_CHECKING:
    from pathlib import Path


def test_tokens_are_of_the_vocabulary_and_never_the_end(tmp_path: Path) -> None:
    made = model(tmp_path)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        prompt = rng.integers(0, VOCABULARY, 5, dtype=np.int32)
        tokens = [made.token(prompt, position) for position in range(50)]
        assert tokens == [made.token(prompt.copy(), position) for position in range(50)]
        seen.update(tokens)
    assert min(seen) >= 0
    assert max(seen) < VOCABULARY
    assert EOS not in seen
    assert len(seen) == VOCABULARY - 1


@virtual
async def test_another_pair_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    async with Site(tmp_path, profile={"speed": 0}) as site:
        prompt = np.frombuffer(site.prompt(20), "<i4")
        answer = [site.model.token(prompt, i) for i in range(12)]
        for where in range(12):
            tokens = np.append(prompt, np.array(answer[:where], np.int32))
            kv = np.zeros((2, len(tokens), site.model.layout.row_bytes), np.uint8)
            job = PrefillJob(tokens, kv, Sampling(), resumed_tokens=where)
            first = await site.p_engines[0].prefill([job])
            sequence = DecodeSequence(tokens, first, [(0, 64)], Sampling(), resumed_tokens=where)
            local = DecodeSequence(tokens, [], [(64, 64)], Sampling(), resumed_tokens=where)
            assert await site.d_engines[0].prefill(local, 0, len(tokens)) == first[0]
            while len(sequence.tokens) < 12 - where:
                sequence.tokens += await site.d_engines[0].step([sequence])
            assert sequence.tokens == answer[where:]


@pytest.mark.parametrize(
    ("eos", "found"), [(2, {2}), ([2, 5], {2, 5}), (None, set()), ("absent", set())]
)
def test_ends_of_sequence_in_the_models_config(tmp_path: Path, eos: Any, found: set[int]) -> None:
    names = {"vocab_size": 10, "eos_token_id": eos}
    if eos == "absent":
        del names["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(names))
    made = EmulatedModel(str(tmp_path), None)
    assert made.eos_ids == found
    assert made.profile.speed == 0, "without a profile it does not wait"


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("speed: -1", "speed"),
        ("sped: 1", "sped"),
        ("prefill: {per_token_ms: fast}", r"prefill\.per_token_ms"),
        ("layers: 0", "layers"),
        ("head_dim: 3", "head_dim"),
        (":", "profile.yaml"),
    ],
)
def test_profile_that_is_wrong(tmp_path: Path, profile: str, message: str) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    path = tmp_path / "profile.yaml"
    path.write_text(profile)
    with pytest.raises(DeploymentError, match=f"emulated engine: .*{message}"):
        EmulatedModel(str(tmp_path), str(path))


@pytest.mark.parametrize("missing", ["profile", "config"])
def test_files_that_are_missing(tmp_path: Path, missing: str) -> None:
    if missing == "profile":
        (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    profile = str(tmp_path / "profile.yaml") if missing == "profile" else None
    with pytest.raises(DeploymentError, match="No such file"):
        EmulatedModel(str(tmp_path), profile)


def test_config_without_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeploymentError, match="vocab_size"):
        EmulatedModel(str(tmp_path), None)


def test_models_of_two_profiles_do_not_exchange(tmp_path: Path) -> None:
    prints = [model(tmp_path, layers=layers).fingerprint for layers in (1, 2, 2)]
    assert prints[0] != prints[1] == prints[2]


@virtual
async def test_timing(tmp_path: Path) -> None:
    profile = {
        "speed": 2.0,
        "prefill": {"base_ms": 10.0, "per_token_ms": 0.5, "per_token_squared_ms": 0.01},
        "decode": {"base_ms": 4.0, "per_sequence_ms": 2.0, "per_context_token_ms": 0.1},
    }
    async with Site(tmp_path, profile=profile) as site:
        request = site.request(20, max_tokens=3)
        assert await site.answer(request) == site.expected(request)
        assert request.prefill_ms == pytest.approx((10 + 10 + 4) / 2, abs=0.01)
        steps = [(4 + 2 + 0.1 * (20 + tokens)) / 2 for tokens in (1, 2)]
        decode_ms = (request.ended - request.first_token) * 1e3
        assert decode_ms == pytest.approx(sum(steps), abs=0.01)
        await site.idle()


@virtual
async def test_speed_0_waits_for_nothing(tmp_path: Path) -> None:
    profile = {"speed": 0, "prefill": {"base_ms": 1e9}, "decode": {"base_ms": 1e9}}
    async with Site(tmp_path, profile=profile) as site:
        began = asyncio.get_running_loop().time()
        request = site.request(max_tokens=50, stream=False)
        assert await site.answer(request) == site.expected(request)
        assert asyncio.get_running_loop().time() == began
        await site.idle()
