"""Tests that ``ensemble`` answers as ``pdserve`` does, text for text and part for part."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import Answer, ask, connected, generate_stream, post
from tests.corpus import Prompt, corpus

if TYPE_CHECKING:
    from tests.reference import Reference
    from tests.servers import Running

pytestmark = pytest.mark.triton


async def answers(
    server: Running, model: str, prompts: list[Prompt], in_flight: int = 16, **asked: Any
) -> list[Answer]:
    places = asyncio.Semaphore(in_flight)
    async with connected(server) as client:

        async def one(prompt: Prompt) -> Answer:
            async with places:
                limits = {"ttft_limit_ms": 600_000, "timeout": 900.0}
                return await ask(client, model, text_input=prompt.text, **limits, **asked)

        return await asyncio.gather(*map(one, prompts))


def compared(server: Running, prompts: list[Prompt], **asked: Any) -> list[Answer]:
    """Check the answers of both, streamed and not, and return the ensemble's streamed ones."""
    ours = asyncio.run(answers(server, "pdserve", prompts, stream=True, **asked))
    streamed = asyncio.run(answers(server, "ensemble", prompts, stream=True, **asked))
    whole = asyncio.run(answers(server, "ensemble", prompts, stream=False, **asked))
    for prompt, one, parts, alone in zip(prompts, ours, streamed, whole, strict=True):
        assert parts.text == alone.text == one.text, prompt.name
        assert parts.finish_reason == alone.finish_reason == one.finish_reason, prompt.name
        for name in ("prompt_tokens", "output_tokens", "scenario", "group"):
            assert parts.stats[name] == alone.stats[name] == one.stats[name], prompt.name
        assert all(part.text for part in parts.parts[:-1]), f"{prompt.name}: an empty response"
        assert not any(part.finish_reason or part.stats for part in parts.parts[:-1])
        assert len(alone.parts) == 1
    return streamed


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="60"), pytest.param(200, id="200", marks=pytest.mark.full)]
)
def test_of_random_tokens(emulated_server: Running, reference: Reference, count: int) -> None:
    """The emulated engine draws any token of the vocabulary, parts of characters among them."""
    prompts = corpus(reference.encode, count, 2000)
    found = compared(emulated_server, prompts, max_tokens=100)

    assert sum(len(answer.parts) for answer in found) > 2 * len(prompts)
    assert sum("\ufffd" in answer.text for answer in found) > count // 10


@pytest.mark.parametrize("stop", [["é"], ["的"], [" the"], ["\ufffd"], [" the", "的", "\ufffd"]])
def test_before_a_stop_string(
    emulated_server: Running, reference: Reference, stop: list[str]
) -> None:
    """What may become the stop string is held back, so that it may lie in several responses."""
    prompts = corpus(reference.encode, 40, 50, seed=3)
    for answer in compared(emulated_server, prompts, max_tokens=100, stop_words=stop):
        assert not any(word in answer.text for word in stop)


def test_a_stop_string_over_several_responses(emulated_server: Running) -> None:
    """A stop string is as long as the allowed 256 bytes, and begins in an early response."""
    prompt = [Prompt("long-stop", "The sky is", (1,))]
    (whole,) = asyncio.run(answers(emulated_server, "pdserve", prompt, max_tokens=120))
    start = len(whole.parts[0].text) // 3
    word = whole.text[start : start + 100]
    (answer,) = compared(emulated_server, prompt, max_tokens=120, stop_words=[word, word + "!"])
    assert answer.text == whole.text[: whole.text.index(word)]
    assert answer.finish_reason == "stop"


def test_with_an_echo(emulated_server: Running, reference: Reference) -> None:
    prompts = corpus(reference.encode, 30, 50, seed=4)
    found = compared(emulated_server, prompts, max_tokens=20, exclude_input_in_output=False)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.text.startswith(prompt.text)


def test_over_http(emulated_server: Running, reference: Reference) -> None:
    for prompt in corpus(reference.encode, 20, 100, seed=2):
        asked = {"text_input": prompt.text, "max_tokens": 60, "stream": True}
        one = Answer(list(generate_stream(emulated_server, "pdserve", **asked)))
        other = Answer(list(generate_stream(emulated_server, "ensemble", **asked)))
        assert other.text == one.text, prompt.name


def test_an_id_without_a_token_has_no_text(emulated_server: Running) -> None:
    """A model may have more ids than its vocabulary, and no answer fails for one of them."""
    ids = {"output_ids": [28, 60_000, 29], "text_span": [1, 2], "text_before": "echo "}
    path = "/v2/models/detokenizer/generate"
    status, part = post(emulated_server, path, ids)
    _, whole = post(emulated_server, path, {"output_ids": [28, 29]})
    assert (status, part["text_output"]) == (200, "echo " + whole["text_output"][1:2])


@pytest.mark.parametrize(
    ("count", "longest", "tokens"),
    [
        pytest.param(6, 60, 8, id="6-prompts"),
        pytest.param(200, 300, 16, id="200-prompts", marks=pytest.mark.full),
    ],
)
def test_of_the_model(
    torch_server: Running, reference: Reference, count: int, longest: int, tokens: int
) -> None:
    """A seed makes the tokens of all requests the same, whatever else is computed with them."""
    prompts = corpus(reference.encode, count, longest)
    compared(torch_server, prompts, in_flight=4, max_tokens=tokens, temperature=1.2, seed=7)
