"""Tests for streamed text: valid UTF-8 at every cut, and in all the text of all ids."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import Answer, ask, connected, generate_stream
from tests.corpus import Prompt, corpus

if TYPE_CHECKING:
    from tests.reference import Reference
    from tests.servers import Running

pytestmark = pytest.mark.triton


async def pairs(
    server: Running, prompts: list[Prompt], **asked: Any
) -> list[tuple[Answer, Answer]]:
    """Return each prompt's streamed text, and its ids from the same request to the scheduler."""
    places = asyncio.Semaphore(16)
    async with connected(server) as client:

        async def pair(prompt: Prompt) -> tuple[Answer, Answer]:
            async with places:
                common = {"ttft_limit_ms": 600_000, "timeout": 900.0, **asked}
                text = await ask(client, text_input=prompt.text, stream=True, **common)
                ids = await ask(client, "scheduler", input_ids=list(prompt.ids), **common)
                return text, ids

        return await asyncio.gather(*map(pair, prompts))


def check(reference: Reference, prompts: list[Prompt], answers: list[tuple[Answer, Answer]]) -> int:
    """Check the parts, which were decoded strictly on arrival; return how many there were."""
    for prompt, (text, ids) in zip(prompts, answers, strict=True):
        assert text.text == reference.decode(ids.ids), prompt.name
        assert text.stats["prompt_tokens"] == len(prompt.ids), prompt.name
        assert text.stats["output_tokens"] == len(ids.ids), prompt.name
        assert all(part.text for part in text.parts[:-1]), f"{prompt.name}: an empty response"
    return sum(len(text.parts) for text, _ in answers)


def test_of_random_tokens(emulated_server: Running, reference: Reference) -> None:
    """The emulated engine draws any token of the vocabulary, parts of characters among them."""
    prompts = corpus(reference.encode, 200, 2000)
    answers = asyncio.run(pairs(emulated_server, prompts, max_tokens=100))

    parts = check(reference, prompts, answers)
    assert parts > 2 * len(prompts)
    assert sum("\ufffd" in text.text for text, _ in answers) > 20


@pytest.mark.parametrize(
    ("count", "longest", "tokens"),
    [
        pytest.param(16, 200, 16, id="16-prompts"),
        pytest.param(200, 2000, 32, id="200-prompts", marks=pytest.mark.full),
    ],
)
def test_of_the_model(
    torch_server: Running, reference: Reference, count: int, longest: int, tokens: int
) -> None:
    """A seed makes the tokens of both requests the same."""
    prompts = corpus(reference.encode, count, longest)
    asked = {"max_tokens": tokens, "temperature": 1.2, "seed": 7}
    answers = asyncio.run(pairs(torch_server, prompts, **asked))

    assert check(reference, prompts, answers) > count


def test_over_http(emulated_server: Running, reference: Reference) -> None:
    prompts = corpus(reference.encode, 30, 100, seed=2)
    for prompt in prompts:
        asked = {"max_tokens": 60, "stream": True}
        text = Answer(list(generate_stream(emulated_server, text_input=prompt.text, **asked)))
        ids = Answer(
            list(generate_stream(emulated_server, "scheduler", input_ids=list(prompt.ids), **asked))
        )
        check(reference, [prompt], [(text, ids)])


@pytest.mark.parametrize("stop", ["é", "的", "🙂", " the", "\ufffd"])
def test_before_a_stop_string(emulated_server: Running, reference: Reference, stop: str) -> None:
    """The text ends where the stop string begins, wherever that is in the tokens."""
    prompts = corpus(reference.encode, 40, 50, seed=3)
    whole = asyncio.run(pairs(emulated_server, prompts, max_tokens=100))
    cut = asyncio.run(pairs(emulated_server, prompts, max_tokens=100, stop_words=[stop]))

    for (full, _), (text, ids) in zip(whole, cut, strict=True):
        head, found, _ = full.text.partition(stop)
        assert text.text == head
        assert text.finish_reason == ids.finish_reason == ("stop" if found else "length")
