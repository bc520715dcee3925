"""Tests that hold for every engine, through the real Triton: torch, emulated, TensorRT-LLM.

TensorRT-LLM is replaced by its fake (`tests/fakes`), which computes real tokens with the torch
engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from pdserve import config
from pdserve.config import Engine, Gateway, Prefill, TritonModel
from pdserve.config.llm_options import (
    CacheTransceiverConfig,
    KvCacheConfig,
    LlmArguments,
    LlmOptions,
)
from pdserve.engines.emulated import EmulatedModel
from tests.clients import (
    Answer,
    Part,
    Refused,
    connected,
    generate,
    held,
    stream,
    stub,
    wait_idle,
    wait_linked,
    wait_until,
)
from tests.fakes.repository import with_backend, with_tensorrt_llm
from tests.servers import Running, default_deployment, emulated_deployment, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.reference import Reference

pytestmark = pytest.mark.triton

KINDS = ("torch", "emulated", "tensorrt_llm", "tensorrtllm_backend")
LEASE_S = 2.0
"""Time after which an engine of TensorRT-LLM frees a KV cache that no decode has taken."""
GONE_S = LEASE_S + 1.0
TOKENS = 8
PROMPT = "The capital of France is"
LONG = 300
"""Tokens of a prompt that takes some time, but far less than GONE_S: a forward is not cut short."""
POOL = LlmArguments(kv_cache_config=KvCacheConfig(max_tokens=4096))


@contextlib.contextmanager
def serving(kind: str, folder: Path) -> Iterator[Running]:
    """A prefill and a decode beside the gateway, and one of each in a server to be killed."""
    sections: dict[str, Any] = {
        "servers": (
            config.Server("local", prefill=("prefill_0",), decode=("decode_0",)),
            config.Server("other", gateway=False, prefill=("prefill_1",), decode=("decode_1",)),
        ),
        "prefill": Prefill(lease_s=LEASE_S),
        "gateway": Gateway(stall_s=5.0, ttft_limit_ms=30_000),
    }
    if kind == "emulated":
        profile = {"prefill": {"per_token_ms": 2}, "decode": {"base_ms": 20}}
        wanted = msgspec.structs.replace(emulated_deployment(folder, profile), **sections)
        with running(wanted, folder) as server:
            yield server
        return
    wanted = msgspec.structs.replace(default_deployment("torch"), **sections)
    with contextlib.ExitStack() as stack:
        source: dict[str, Path] = {}
        engine = Engine(threads=1)
        if kind == "tensorrt_llm":
            engine = Engine(kind=kind, tensorrt_llm=LlmOptions(prefill=POOL, decode=POOL))
            source = {"source": with_tensorrt_llm(folder)}
        if kind == "tensorrtllm_backend":
            engine = stack.enter_context(backend_server(wanted, folder / "backend_server"))
        wanted = msgspec.structs.replace(wanted, engine=engine)
        yield stack.enter_context(running(wanted, folder, **source))


@contextlib.contextmanager
def backend_server(wanted: config.Deployment, folder: Path) -> Iterator[Engine]:
    """A Triton server with models of the C++ backend, and the engine that uses them."""
    folder.mkdir()
    models = {f"{role}_{number}": role for number in (0, 1) for role in ("prefill", "decode")}
    names = {name: name.replace("prefill", "context") for name in models}
    names = {name: model.replace("decode", "generation") for name, model in names.items()}
    server = config.Server(
        "engines",
        gateway=False,
        prefill=tuple(names[name] for name, role in models.items() if role == "prefill"),
        decode=tuple(names[name] for name, role in models.items() if role == "decode"),
    )
    alone = msgspec.structs.replace(wanted, servers=(server,))
    source = with_backend(folder, engine_dir=wanted.model, max_tokens_in_paged_kv_cache="4096")
    with running(alone, folder, source) as server:
        yield Engine(
            kind="tensorrtllm_backend",
            models={name: TritonModel(server.grpc, model) for name, model in names.items()},
        )


@pytest.fixture(scope="module", params=KINDS)
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(request.param, tmp_path_factory.mktemp("engines")) as server:
        wait_linked(server)
        yield server


@pytest.fixture
def answers(server: Running, reference: Reference) -> Callable[[list[int], int], list[int]]:
    """Return the answer that an engine of this kind must give to a prompt."""
    if server.deployment.engine.kind != "emulated":
        return reference.generate
    model = EmulatedModel(server.deployment.model, server.deployment.engine.profile)
    return lambda prompt, tokens: [
        model.token(np.array(prompt, np.int32), position) for position in range(tokens)
    ]


def streamed(server: Running, ids: list[int], tokens: int = TOKENS, **inputs: Any) -> Answer:
    """Return an answer of the scheduler, in parts."""

    async def run() -> Answer:
        async with connected(server) as client:
            asked = {"input_ids": ids, "max_tokens": tokens, "stream": True, **inputs}
            return Answer([part async for part in stream(client, "scheduler", **asked)])

    return asyncio.run(run())


def parts_of(server: Running) -> list[Running]:
    """Yield each of its servers, so that its metrics can be read."""
    return [dataclasses.replace(server, metrics=one.metrics) for one in server.servers]


def wait_all_idle(server: Running, within: float) -> None:
    for part in parts_of(server):
        wait_idle(part, within)


def all_held(server: Running) -> dict[str, float]:
    return {key: value for part in parts_of(server) for key, value in held(part).items()}


@contextlib.contextmanager
def decodes_stopped(server: Running) -> Iterator[None]:
    stopped = [stub(server, name) for name in server.deployment.instances("decode")]
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            process.resume()


def test_streaming(server: Running, reference: Reference, answers: Any) -> None:
    """Streamed in parts, as text and at once, the tokens are those of the model."""
    prompt = reference.encode(PROMPT)
    answer = streamed(server, prompt)
    assert answer.ids == answers(prompt, TOKENS)
    assert len(answer.parts[0].ids) == 1
    assert len(answer.parts) > 2
    assert answer.finish_reason == "length"
    assert answer.stats["attempts"] == 1
    assert answer.stats["prefill"].startswith("prefill_")
    assert answer.stats["decode"].startswith("decode_")
    whole = generate(server, text_input=PROMPT, max_tokens=TOKENS)
    assert whole.text == reference.decode(answer.ids)
    wait_all_idle(server, GONE_S)


def test_many_at_once(server: Running, answers: Any) -> None:
    """There are more than the prefills hold: slots are counted, and every request is served."""
    prompts = [[number + 40, 7, 300 + number, 9] for number in range(16)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(functools.partial(streamed, server, tokens=4), prompts))
    assert [answer.ids for answer in found] == [answers(prompt, 4) for prompt in prompts]
    for role in ("prefill", "decode"):
        assert {answer.stats[role] for answer in found} == set(server.deployment.instances(role))
    wait_all_idle(server, GONE_S)


def test_the_first_token_waits_for_no_decode(
    server: Running, reference: Reference, answers: Any
) -> None:
    prompt = reference.encode(PROMPT)

    async def run() -> list[Part]:
        async with connected(server) as client:
            asked = {"input_ids": prompt, "max_tokens": TOKENS, "stream": True}
            parts = stream(client, "scheduler", **asked)
            with decodes_stopped(server):
                first = await asyncio.wait_for(anext(parts), 10)
                second = asyncio.ensure_future(anext(parts))
                await asyncio.sleep(0.3)
                assert not second.done()
            return [first, await second, *[part async for part in parts]]

    parts = asyncio.run(run())
    assert [token for part in parts for token in part.ids] == answers(prompt, TOKENS)
    assert parts[1].at - parts[0].at > 0.3
    wait_all_idle(server, GONE_S)


def test_one_token_is_the_prefills_alone(
    server: Running, reference: Reference, answers: Any
) -> None:
    prompt = reference.encode(PROMPT)
    with decodes_stopped(server):
        answer = streamed(server, prompt, 1)
        assert answer.ids == answers(prompt, 1)
        assert answer.finish_reason == "length"
        assert not answer.stats["decode"]
    wait_all_idle(server, 1.0)


def test_sampling(server: Running) -> None:
    """The seed alone decides, whichever engine computes it."""
    if server.deployment.engine.kind == "emulated":
        pytest.skip("the emulated engine's tokens are a function of the prompt alone")
    asked = {"text_input": PROMPT, "max_tokens": TOKENS, "temperature": 1.2, "top_p": 0.9}
    texts = [generate(server, **asked, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate(server, **{**asked, "temperature": 0.0}).text for _ in range(2)]
    assert greedy[0] == greedy[1]
    repeated = generate(server, text_input=PROMPT, max_tokens=TOKENS, repetition_penalty=2.0)
    assert repeated.text != greedy[0]
    wait_all_idle(server, GONE_S)


def test_the_end_as_first_token(server: Running, reference: Reference) -> None:
    if server.deployment.engine.kind == "emulated":
        pytest.skip("the emulated engine's answers have no end")
    turns = [{"role": "user", "content": "Answer with one word: is water wet?"}]
    prompt: list[int] = reference.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    answer = reference.generate(prompt, 60)
    assert answer[-1] in reference.eos_ids
    ended = streamed(server, [*prompt, *answer[:-1]])
    assert ended.finish_reason == "stop"
    assert ended.ids == answer[-1:]
    longer = streamed(server, [*prompt, *answer[:-1]], ignore_eos=True)
    assert longer.stats["output_tokens"] == TOKENS
    wait_all_idle(server, GONE_S)


def leave(server: Running, prompt: list[int], parts: int, ready: Callable[[], bool]) -> None:
    """Leave after this many parts, once ``ready``."""

    async def run() -> None:
        async with connected(server) as client:
            asked = {"input_ids": prompt, "max_tokens": 200, "stream": True}
            responses = stream(client, "scheduler", **asked)
            first = asyncio.ensure_future(anext(responses))
            for _ in range(parts):
                await first
                first = asyncio.ensure_future(anext(responses))
            await asyncio.to_thread(wait_until, ready, 10)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await responses.aclose()

    asyncio.run(run())


def test_cancelled_in_prefill(server: Running) -> None:
    leave(server, [7] * LONG, 0, lambda: any("prefill_" in key for key in all_held(server)))
    wait_all_idle(server, GONE_S)


def test_cancelled_while_it_waits_for_a_decode(server: Running) -> None:
    with decodes_stopped(server):
        leave(server, [7] * 20, 1, lambda: True)
    wait_all_idle(server, GONE_S)


def test_cancelled_in_decode(server: Running) -> None:
    leave(server, [7] * 20, 3, lambda: any("decode_" in key for key in all_held(server)))
    wait_all_idle(server, GONE_S)


def test_a_limit_that_passes(server: Running) -> None:
    with pytest.raises(Refused, match="TTFT limit of 30 ms"):
        generate(server, "scheduler", input_ids=[7] * 100, max_tokens=4, ttft_limit_ms=30)
    with pytest.raises(Refused, match=r"max_tokens: 100000; allowed: 1 to"):
        generate(server, text_input=PROMPT, max_tokens=100_000)
    wait_all_idle(server, GONE_S)


def test_lost_instances_cost_no_request(server: Running, answers: Any) -> None:
    """This is the last test of the server, because it kills it."""
    # Long answers: an answer that lacks only its last token needs no decode after the loss. The
    # emulated engine has 48 tokens in a second, no more time than it takes to notice and to kill;
    # on a busy machine that takes as long as 48 tokens of the others do.
    tokens = 150 if server.deployment.engine.kind == "emulated" else 96
    prompts = [[number + 60, 8, 400 + number] for number in range(3, 7)]

    async def run() -> list[list[Part]]:
        async with connected(server) as client:

            async def one(prompt: list[int]) -> list[Part]:
                asked = {"input_ids": prompt, "max_tokens": tokens, "stream": True}
                return [part async for part in stream(client, "scheduler", **asked)]

            streams = [asyncio.create_task(one(prompt)) for prompt in prompts]
            decodes = asyncio.to_thread(
                wait_until, lambda: any("decode_1" in key for key in all_held(server)), 10
            )
            await decodes
            server.servers[1].kill()
            return await asyncio.gather(*streams)

    found = asyncio.run(run())
    assert max(parts[-1].stats["attempts"] for parts in found if parts[-1].stats) > 1
    for prompt, parts in zip(prompts, found, strict=True):
        assert parts[-1].finish_reason
        assert [token for part in parts for token in part.ids] == answers(prompt, tokens)
        stats = parts[-1].stats
        assert stats is not None
        # An answer may have ended before.
        assert stats["decode"] == "decode_0" or stats["attempts"] == 1
        assert stats["output_tokens"] == tokens


# ------------------------------------------------------------------------------- versions and links


def emulated_fake(
    folder: Path, monkeypatch: pytest.MonkeyPatch, transceiver: Any = None
) -> config.Deployment:
    """A prefill and a decode of the fake of TensorRT-LLM, which waits instead of computing."""
    profile = folder / "timing.yaml"
    profile.write_text("{prefill: {per_token_ms: 0.1}, decode: {base_ms: 2}}")
    monkeypatch.setenv("FAKE_TENSORRT_LLM_PROFILE", str(profile))
    options = LlmOptions(
        CacheTransceiverConfig(transceiver_runtime=transceiver), prefill=POOL, decode=POOL
    )
    return msgspec.structs.replace(
        default_deployment("torch"),
        servers=(config.Server("local", prefill=("prefill_0",), decode=("decode_0",)),),
        engine=Engine(kind="tensorrt_llm", tensorrt_llm=options),
        prefill=Prefill(lease_s=LEASE_S),
        gateway=Gateway(stall_s=2.0, ttft_limit_ms=5000),
    )


@pytest.mark.parametrize(
    ("version", "transceiver"),
    [
        ("1.0.0", None),
        ("1.2.1", None),
        ("1.3.0rc29", "PYTHON"),
        ("1.4.0rc1", "CPP"),
        ("1.4.0rc1", "PYTHON"),
        ("1.4.0rc1", None),
    ],
)
def test_each_version_and_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, transceiver: str | None
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_LLM_VERSION", version)
    wanted = emulated_fake(tmp_path, monkeypatch, transceiver)
    with running(wanted, tmp_path, with_tensorrt_llm(tmp_path)) as server:
        wait_linked(server)
        model = EmulatedModel(wanted.model, os.environ["FAKE_TENSORRT_LLM_PROFILE"])
        prompts = [[number, 5, 6] for number in range(10, 18)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(functools.partial(streamed, server), prompts))
        for prompt, answer in zip(prompts, found, strict=True):
            tokens = [model.token(np.array(prompt, np.int32), at) for at in range(TOKENS)]
            assert answer.ids == tokens
            assert answer.stats["kv"]["transport"] == "tensorrt_llm"
        wait_idle(server, GONE_S)


def test_versions_that_do_not_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before any KV cache is computed in vain, and names both."""
    source = with_tensorrt_llm(tmp_path)
    model = source / "decode" / "1" / "model.py"
    older = 'import os\n\nos.environ["FAKE_TENSORRT_LLM_VERSION"] = "1.2.1"\n'
    model.write_text(older + model.read_text())
    with running(emulated_fake(tmp_path, monkeypatch), tmp_path, source) as server:
        wait_linked(server)
        with pytest.raises(Refused, match=r"no decode reaches prefill_0.*is 1\.4\.0rc1:.*1\.2\.1"):
            generate(server, text_input=PROMPT, max_tokens=4)


def test_a_transfer_that_stalls_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text('[{"at": "transfer", "nth": 1, "do": "stall", "seconds": 30}]')
    monkeypatch.setenv("FAKE_TENSORRT_LLM_FAULTS", str(faults))
    wanted = emulated_fake(tmp_path, monkeypatch)
    with running(wanted, tmp_path, with_tensorrt_llm(tmp_path)) as server:
        wait_linked(server)
        answer = generate(server, text_input=PROMPT, max_tokens=4)
        assert answer.stats["attempts"] == 2
        assert answer.stats["output_tokens"] == 4
        assert 2.0 < answer.stats["ms"]["e2e"] / 1e3 < 8.0
