"""Tests that greedy answers are those of transformers' ``generate`` in float32."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.clients import ask, connected
from tests.corpus import Prompt, corpus

if TYPE_CHECKING:
    from tests.clients import Answer
    from tests.reference import Reference
    from tests.servers import Running

pytestmark = pytest.mark.triton

PREFIX_BLOCK = 32
"""Prompts are reused in blocks of this many tokens; at least one token is always computed."""


class AnsweredPrompt(NamedTuple):
    prompts: list[Prompt]
    tokens: int
    """Maximum tokens of each answer."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((16, 300, 12), id="16-prompts"),
        pytest.param((200, 2000, 32), id="200-prompts", marks=pytest.mark.full),
    ],
)
def answered(request: pytest.FixtureRequest, reference: Reference) -> AnsweredPrompt:
    """Return prompts with the answers of transformers."""
    count, longest, tokens = request.param
    prompts = corpus(reference.encode, count, longest)
    for prompt in prompts:
        reference.generate(prompt.ids, tokens)
    return AnsweredPrompt(prompts, tokens)


@pytest.mark.parametrize("in_flight", [1, 16], ids=["alone", "16-in-flight"])
def test_every_token_is_transformers_own(
    torch_server: Running, reference: Reference, answered: AnsweredPrompt, in_flight: int
) -> None:
    """Each prompt is sent twice by a separate tenant: first computed in full, then reused."""
    answers = asyncio.run(ask_twice(torch_server, answered, in_flight))

    wrong = []
    for prompt, pair in zip(answered.prompts, answers, strict=True):
        for reuse, answer in zip(("cold", "warm"), pair, strict=True):
            try:
                ties = reference.ties(prompt.ids, answer.ids, answered.tokens)
            except AssertionError as difference:
                wrong.append(f"{prompt.name} {reuse}: {difference}")
                continue
            for tie in ties:
                print(f"{prompt.name} {reuse}: {tie}")
    reused = sum(warm.stats["cached_tokens"] > 0 for _, warm in answers)
    print(f"{len(answers)} prompts, {reused} reused, {len(wrong)} wrong")

    assert not wrong, "\n".join(wrong)
    assert all(cold.stats["cached_tokens"] == 0 for cold, _ in answers)
    long = [
        warm
        for prompt, (_, warm) in zip(answered.prompts, answers, strict=True)
        if len(prompt.ids) > PREFIX_BLOCK
    ]
    assert len(long) >= len(answers) // 4
    if in_flight == 1:  # otherwise another prefill might take the second request
        assert all(warm.stats["cached_tokens"] >= PREFIX_BLOCK for warm in long)
    else:
        assert any(warm.stats["cached_tokens"] >= PREFIX_BLOCK for warm in long)


async def ask_twice(
    server: Running, answered: AnsweredPrompt, in_flight: int
) -> list[tuple[Answer, Answer]]:
    places = asyncio.Semaphore(in_flight)
    async with connected(server) as client:

        async def pair(prompt: Prompt) -> tuple[Answer, Answer]:
            async with places:
                inputs = {
                    "input_ids": list(prompt.ids),
                    "max_tokens": answered.tokens,
                    "tenant": f"exactness-{in_flight}-{prompt.name}",
                    "ttft_limit_ms": 600_000,
                    "timeout": 900.0,
                }
                first = await ask(client, "scheduler", **inputs)
                return first, await ask(client, "scheduler", **inputs)

        return await asyncio.gather(*map(pair, answered.prompts))


def test_a_prefix_shared_by_different_prompts_is_computed_once(
    torch_server: Running, reference: Reference, answered: AnsweredPrompt
) -> None:
    prompts = [prompt for prompt in answered.prompts if "prefix" in prompt.name]
    prompts = [prompt for prompt in prompts if len(prompt.ids) > 2 * PREFIX_BLOCK]
    # The longest first: the others find the prefix that they share with it.
    prompts.sort(key=lambda prompt: -len(prompt.ids))
    tails = [[*prompts[0].ids[:96], *prompt.ids[-5:]] for prompt in answered.prompts[:3]]

    async def run() -> list[Answer]:
        async with connected(torch_server) as client:
            return [
                await ask(
                    client,
                    "scheduler",
                    input_ids=list(ids),
                    max_tokens=answered.tokens,
                    tenant="shared",
                    timeout=300.0,
                )
                for ids in [prompts[0].ids, *tails]
            ]

    first, *others = asyncio.run(run())

    assert first.stats["cached_tokens"] == 0
    assert {answer.stats["cached_tokens"] for answer in others} == {96}
    for ids, answer in zip([list(prompts[0].ids), *tails], [first, *others], strict=True):
        for tie in reference.ties(ids, answer.ids, answered.tokens):
            print(tie)
