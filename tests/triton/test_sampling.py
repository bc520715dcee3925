"""Tests that sampling with a seed gives the same tokens, whatever else is computed."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import ask, connected
from tests.servers import default_deployment, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients import Answer
    from tests.servers import Running

pytestmark = pytest.mark.triton

TOKENS = 16
PROMPTS = [
    "Once upon a time",
    "def fibonacci(n):",
    "The library is open from nine to six. " * 8,
    "你好",
]
WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 2.0, "frequency_penalty": 1.0, "top_p": 0.7},
]
SEEDED = [
    {"text_input": prompt, "seed": 2**63 + number, "max_tokens": TOKENS, "ignore_eos": True, **way}
    for number, (prompt, way) in enumerate(zip(PROMPTS, WAYS, strict=True))
]


@pytest.fixture(scope="module")
def alone(torch_server: Running) -> list[str]:
    """Return the text of each request, with no other request in the server."""
    return asyncio.run(one_by_one(torch_server))


async def one_by_one(server: Running) -> list[str]:
    async with connected(server) as client:
        return [(await ask(client, **asked)).text for asked in SEEDED]


async def with_others(server: Running, seed: int) -> list[str]:
    """Return the text of each, with 16 other requests of any kind open all the time."""
    rng = random.Random(seed)
    async with connected(server) as client:
        others = [asyncio.create_task(company(client, rng)) for _ in range(16)]
        await asyncio.sleep(1.0)
        answers: list[Answer] = await asyncio.gather(
            *(ask(client, ttft_limit_ms=300_000, timeout=300.0, **asked) for asked in SEEDED)
        )
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return [answer.text for answer in answers]


async def company(client: Any, rng: random.Random) -> None:
    while True:
        asked: dict[str, Any] = {
            "text_input": rng.choice(PROMPTS) + "x" * rng.randint(0, 60),
            "max_tokens": rng.randint(1, 24),
            "stream": rng.random() < 0.5,
            "temperature": rng.choice([0.0, 0.7, 1.3]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "ttft_limit_ms": 300_000,
        }
        if rng.random() < 0.3:
            asked["seed"] = rng.getrandbits(64)
        await ask(client, timeout=300.0, **asked)


def test_every_run_is_the_same(torch_server: Running, alone: list[str]) -> None:
    assert asyncio.run(one_by_one(torch_server)) == alone


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2, 3))]
)
def test_other_requests_change_nothing(torch_server: Running, alone: list[str], seed: int) -> None:
    assert asyncio.run(with_others(torch_server, seed)) == alone


def test_a_restart_changes_nothing(alone: list[str], tmp_path: Path) -> None:
    with running(default_deployment("torch"), tmp_path) as fresh:
        assert asyncio.run(one_by_one(fresh)) == alone


def test_seeds_make_the_difference(torch_server: Running, alone: list[str]) -> None:
    async def run() -> list[str]:
        async with connected(torch_server) as client:
            asked = ({**one, "seed": one["seed"] + 1000} for one in SEEDED)
            return [(await ask(client, **one)).text for one in asked]

    others = asyncio.run(run())
    assert all(ours != other for ours, other in zip(alone, others, strict=True))


def test_without_a_seed_answers_differ(torch_server: Running) -> None:
    async def run() -> set[str]:
        asked = {"text_input": PROMPTS[0], "temperature": 1.5, "max_tokens": 8}
        async with connected(torch_server) as client:
            return {(await ask(client, **asked)).text for _ in range(4)}

    assert len(asyncio.run(run())) > 1


def test_temperature_0_is_greedy_whatever_the_seed(torch_server: Running) -> None:
    async def run() -> set[str]:
        asked = {"text_input": PROMPTS[0], "temperature": 0.0, "max_tokens": 8}
        async with connected(torch_server) as client:
            return {(await ask(client, seed=seed, **asked)).text for seed in (1, 2)}

    assert len(asyncio.run(run())) == 1
