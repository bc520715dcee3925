"""Tests that the fake of TensorRT-LLM behaves as the library's documentation says."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pdserve.engines.emulated import EmulatedModel
from pdserve.transfer.lease.region import SHM
from tests.fakes.importing import tensorrt_llm
from tests.servers import default_deployment
from tests.unit.inprocess import real, until

if TYPE_CHECKING:
    from tests.reference import Reference

VERSIONS = ("1.0.0", "1.2.1", "1.3.0rc29", "1.4.0rc1", "1.5.0.dev0")
SINCE_1_3 = VERSIONS[2:]
PROMPT = list(range(3, 80))
EOS = 2
TOKENS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of an emulated model."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 997, "eos_token_id": EOS}))
    (tmp_path / "profile.yaml").write_text("speed: 0\n")
    return tmp_path


@pytest.fixture(params=VERSIONS)
def any_version(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with tensorrt_llm(request.param) as module:
        yield module


@pytest.fixture
def newest() -> Iterator[ModuleType]:
    with tensorrt_llm() as module:
        yield module


class Site:
    """Engines of one version over one model; the fixture shuts all of them down."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.module = module
        self.folder = folder
        self.llms: list[Any] = []
        self.next_id = 1 << 40

    def llm(self, config: Any = "NIXL", **options: Any) -> Any:
        """Make an engine; `config` is a backend, or a transceiver's complete configuration."""
        if isinstance(config, str):
            config = {"backend": config}
            if self.module.__version__ in SINCE_1_3:
                config["transceiver_runtime"] = "auto"
        given = {
            "skip_tokenizer_init": True,
            "disable_overlap_scheduler": True,
            "cache_transceiver_config": config,
            "kv_cache_config": {"max_tokens": 1024},
            **options,
        }
        self.llms.append(self.module.LLM(model=str(self.folder), **given))
        return self.llms[-1]

    def sampling(self, **options: Any) -> Any:
        return self.module.SamplingParams(**{"end_id": EOS, "max_tokens": TOKENS, **options})

    def context(self, llm: Any, prompt: list[int] = PROMPT, **options: Any) -> Any:
        params = self.module.DisaggregatedParams(request_type="context_only")
        if hasattr(params, "disagg_request_id"):
            self.next_id += 1
            params.disagg_request_id = options.pop("id", self.next_id)
        sampling = options.pop("sampling", None) or self.sampling()
        return llm.generate_async(prompt, sampling, disaggregated_params=params, **options)

    async def link(self, llm: Any, prompt: list[int] = PROMPT, **options: Any) -> Any:
        """Return the link that a generation request needs."""
        result = await self.context(llm, prompt, **options)
        return dataclasses.replace(
            result.outputs[0].disaggregated_params, request_type="generation_only"
        )

    def generation(self, llm: Any, link: Any, prompt: list[int] = PROMPT, **options: Any) -> Any:
        sampling = options.pop("sampling", None) or self.sampling()
        return llm.generate_async(prompt, sampling, disaggregated_params=link, **options)

    def expected(self, prompt: list[int] = PROMPT, tokens: int = TOKENS) -> list[int]:
        model = EmulatedModel(str(self.folder), str(self.folder / "profile.yaml"))
        return [model.token(np.array(prompt, np.int32), i) for i in range(tokens)]

    def close(self) -> None:
        for llm in self.llms:
            llm.shutdown()


@pytest.fixture
def any_site(any_version: ModuleType, folder: Path) -> Iterator[Site]:
    site = Site(any_version, folder)
    yield site
    site.close()


@pytest.fixture
def site(newest: ModuleType, folder: Path) -> Iterator[Site]:
    site = Site(newest, folder)
    yield site
    site.close()


# --------------------------------------------------------------------------------------- signatures


def test_what_each_version_has(any_version: ModuleType) -> None:
    version, api = any_version.__version__, any_version.llmapi
    fields = {field.name for field in dataclasses.fields(any_version.DisaggregatedParams)}
    transceiver = inspect.signature(api.CacheTransceiverConfig).parameters
    asked = list(inspect.signature(any_version.LLM.generate_async).parameters)
    assert fields >= {
        "request_type",
        "first_gen_tokens",
        "ctx_request_id",
        "opaque_state",
        "draft_tokens",
    }
    new = {"disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint", "schedule_style"}
    assert (fields & new == new) if version in SINCE_1_3 else not fields & new
    assert ("transceiver_runtime" in transceiver) is (version in SINCE_1_3)
    assert ("kv_transfer_timeout_ms" in transceiver) is (version != VERSIONS[0])
    if version == VERSIONS[0]:
        assert set(transceiver) == {"backend", "max_tokens_in_buffer"}
    else:
        timeout = transceiver["kv_transfer_timeout_ms"].default
        assert timeout == (60000 if version in SINCE_1_3 else None)
    assert ("priority" in asked, "conversation_params" in asked) == (version in SINCE_1_3,) * 2
    assert ("trace_headers" in asked) is (version != VERSIONS[0])
    assert asked.index("_postproc_params") == (7 if version == VERSIONS[0] else 8) + 1
    has_ids = hasattr(
        sys.modules["tensorrt_llm.llmapi.disagg_utils"], "get_global_disagg_request_id"
    )
    assert has_ids is (version in SINCE_1_3)


def test_what_is_not_known_is_refused(any_site: Site) -> None:
    api = any_site.module.llmapi
    with pytest.raises(ValueError, match="bogus"):
        any_site.llm(bogus=1)
    with pytest.raises(ValueError, match="bogus"):
        any_site.llm({"backend": "UCX", "bogus": 1})
    with pytest.raises(ValueError, match="bogus"):
        api.KvCacheConfig(bogus=1)
    with pytest.raises(ValueError, match="backend"):
        api.CacheTransceiverConfig(backend="nixl")
    with pytest.raises(ValueError, match="max_batch_size"):
        any_site.llm(max_batch_size=0)
    with pytest.raises(TypeError, match="bogus"):
        any_site.module.SamplingParams(bogus=1)
    with pytest.raises(TypeError, match="bogus"):
        any_site.llm().generate_async(PROMPT, bogus=1)
    with pytest.raises(TypeError):
        any_site.module.DisaggregatedParams("context_only")


def test_request_types(any_version: ModuleType) -> None:
    params = any_version.DisaggregatedParams(request_type="CONTEXT_ONLY", ctx_request_id=7)
    assert params.request_type == "context_only"
    assert params.get_request_type().name == "REQUEST_TYPE_CONTEXT_ONLY"
    assert params.get_context_phase_params().req_id == 7
    with pytest.raises(ValueError, match="prefill_only"):
        any_version.DisaggregatedParams(request_type="prefill_only")


def test_global_ids(newest: ModuleType) -> None:
    utils = sys.modules["tensorrt_llm.llmapi.disagg_utils"]
    ids = {utils.get_global_disagg_request_id(255, 63) for _ in range(500)}
    assert len(ids) == 500
    assert all(1 << 40 <= id_ < 1 << 63 for id_ in ids)
    with pytest.raises(ValueError, match="node_id"):
        utils.get_global_disagg_request_id(256)


def test_which_transceiver(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorrt_llm("1.3.0rc29") as module:
        _which_transceiver(module.llmapi.CacheTransceiverConfig, monkeypatch)
    monkeypatch.delenv("TRTLLM_USE_UCX_KVCACHE", raising=False)
    with tensorrt_llm("1.4.0rc1") as module:
        make = partial(module.llmapi.CacheTransceiverConfig, transceiver_runtime="auto")
        _which_transceiver(make, monkeypatch)
        with pytest.raises(ValueError, match="UCX"):
            assert module.llmapi.CacheTransceiverConfig(backend="UCX")._runtime


def _which_transceiver(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make()._runtime is None
    assert make(backend="DEFAULT")._runtime == "PYTHON"
    assert make(backend="UCX")._runtime == "CPP"
    assert make(backend="NIXL", transceiver_runtime="CPP")._runtime == "CPP"
    assert make(backend="NIXL", kv_transfer_timeout_ms=None)._runtime == "CPP"
    with pytest.raises(ValueError, match="UCX"):
        assert make(backend="UCX", transceiver_runtime="PYTHON")._runtime
    monkeypatch.setenv("TRTLLM_USE_UCX_KVCACHE", "1")
    assert make(backend="DEFAULT")._runtime == "CPP"


# ------------------------------------------------------------------------------------------ answers


@real
async def test_an_answer_in_one_piece_and_in_many(any_site: Site) -> None:
    llm = any_site.llm(None)
    whole = await llm.generate_async(PROMPT, any_site.sampling())
    assert whole.outputs[0].token_ids == any_site.expected()
    assert (whole.finished, whole.outputs[0].finish_reason) == (True, "length")
    assert whole.prompt_token_ids == PROMPT
    streamed: list[int] = []
    result = llm.generate_async(PROMPT, any_site.sampling(), streaming=True)
    async for step in result:
        assert step is result
        assert len(step.outputs[0].token_ids_diff) == 1
        streamed += step.outputs[0].token_ids_diff
        assert step.outputs[0].token_ids == streamed
    assert streamed == any_site.expected()
    assert llm.generate(PROMPT, any_site.sampling()).outputs[0].token_ids == streamed


@real
async def test_an_answer_ends_with_the_end_or_a_stop(site: Site) -> None:
    llm, expected = site.llm(None), site.expected()
    ended = await llm.generate_async(PROMPT, site.sampling(end_id=expected[3]))
    assert (ended.outputs[0].token_ids, ended.outputs[0].finish_reason) == (expected[:4], "stop")
    ignored = site.sampling(end_id=expected[3], ignore_eos=True)
    assert (await llm.generate_async(PROMPT, ignored)).outputs[0].token_ids == expected
    stopped = await llm.generate_async(PROMPT, site.sampling(stop_token_ids=[expected[4]]))
    assert (stopped.outputs[0].token_ids, stopped.outputs[0].stop_reason) == (
        expected[:4],
        expected[4],
    )


@real
async def test_invalid_arguments(site: Site) -> None:
    llm = site.llm(max_num_tokens=50)
    with pytest.raises(ValueError, match="end_id"):
        llm.generate_async([3], site.module.SamplingParams())
    with pytest.raises(ValueError, match="max_num_tokens"):
        llm.generate_async(PROMPT, site.sampling())
    with pytest.raises(TypeError):
        llm.generate_async(None, site.sampling())
    with pytest.raises(NotImplementedError, match="logprobs: not in the fake"):
        llm.generate_async([3], site.sampling(logprobs=1))
    chunked = site.llm(max_num_tokens=50, enable_chunked_prefill=True)
    result = await chunked.generate_async(PROMPT, site.sampling())
    assert result.outputs[0].token_ids == site.expected()
    with pytest.raises(RuntimeError, match="max_seq_len"):
        await site.llm(max_seq_len=77).generate_async(PROMPT, site.sampling())


@real
async def test_more_than_a_batch_waits(site: Site) -> None:
    # No request gets a token before all have been submitted, however busy the machine is.
    (site.folder / "profile.yaml").write_text("decode: {base_ms: 50}\n")
    llm = site.llm(max_batch_size=2, enable_iter_perf_stats=True)
    results = [llm.generate_async([3, n], site.sampling()) for n in range(3, 9)]
    for n, result in enumerate(results, 3):
        assert (await result).outputs[0].token_ids == site.expected([3, n])
    stats = [step async for step in llm.get_stats_async(timeout=0.05)]
    assert max(step["numActiveRequests"] for step in stats) == 2
    # A first turn may have begun with the first request alone; then five wait for its end.
    full = [step for step in stats if step["numActiveRequests"] == 2]
    assert max(step["numQueuedRequests"] for step in full) == 4


@real
async def test_abort(site: Site) -> None:
    (site.folder / "profile.yaml").write_text("decode: {base_ms: 5}\n")
    llm = site.llm(max_batch_size=1)
    running = llm.generate_async(PROMPT, site.sampling(max_tokens=900), streaming=True)
    waiting = llm.generate_async(PROMPT, site.sampling())
    await anext(running)
    waiting.abort()
    assert (await waiting).outputs[0].finish_reason == "cancelled"
    running.abort()
    assert (await running).outputs[0].finish_reason == "cancelled"
    assert running.aborted()
    assert len(running.outputs[0].token_ids) < 100
    await until(lambda: llm._engine.used_blocks == 0)


@real
async def test_after_shutdown(site: Site) -> None:
    (site.folder / "profile.yaml").write_text("decode: {base_ms: 5}\n")
    llm = site.llm()
    result = llm.generate_async(PROMPT, site.sampling(max_tokens=900))
    await asyncio.sleep(0.02)
    llm.shutdown()
    with pytest.raises(site.module.llmapi.RequestError):
        await result
    with pytest.raises(RuntimeError, match="LLM is shutting down"):
        llm.generate_async(PROMPT, site.sampling())


@real
async def test_events_of_the_cache(site: Site) -> None:
    llm = site.llm(kv_cache_config={"max_tokens": 1024, "event_buffer_max_size": 10})
    await llm.generate_async(PROMPT, site.sampling())
    events = [event["data"] async for event in llm.get_kv_cache_events_async(timeout=0.05)]
    assert [event["type"] for event in events] == ["created", "stored", "removed"]
    hashes = [block["block_hash"] for block in events[1]["blocks"]]
    assert len(hashes) == len(PROMPT) // 32
    assert events[2]["block_hashes"] == hashes


# ---------------------------------------------------------------------------- disaggregated serving


@real
async def test_the_context_answers_before_anything_has_moved(any_site: Site) -> None:
    llm, sampling = any_site.llm(), any_site.sampling()
    result = await any_site.context(llm, sampling=sampling)
    output = result.outputs[0]
    assert sampling.max_tokens == 1, "in place"
    assert (output.token_ids, output.finish_reason) == (any_site.expected()[:1], "length")
    params = output.disaggregated_params
    assert params is result.disaggregated_params
    assert (params.request_type, params.first_gen_tokens) == ("context_only", output.token_ids)
    assert llm._engine.held == 1
    assert llm._engine.used_blocks == -(-len(PROMPT) // 32)
    if any_site.module.__version__ in SINCE_1_3:
        assert params.opaque_state is None
        assert (params.ctx_dp_rank, params.disagg_request_id) == (0, params.ctx_request_id)
        assert params.ctx_info_endpoint.startswith("tcp://127.0.0.1:")
    else:
        assert params.ctx_request_id < 1 << 40
        assert isinstance(params.opaque_state, bytes)


@real
async def test_a_generation_answers_what_one_engine_would(any_site: Site) -> None:
    ours, theirs = any_site.llm(), any_site.llm()
    whole = await any_site.generation(theirs, await any_site.link(ours))
    assert whole.outputs[0].token_ids == any_site.expected(), "the first token counts"
    await until(lambda: ours._engine.held == 0)
    assert ours._engine.used_blocks == 0
    diffs: list[int] = []
    link = await any_site.link(ours)
    async for step in any_site.generation(theirs, link, streaming=True):
        diffs += step.outputs[0].token_ids_diff
        assert step.outputs[0].token_ids == any_site.expected()[: len(diffs) + 1]
    assert diffs == any_site.expected()[1:], "the first token is part of no difference"


@real
async def test_one_engine_in_both_roles(site: Site) -> None:
    llm = site.llm()
    result = await site.generation(llm, await site.link(llm))
    assert result.outputs[0].token_ids == site.expected()


@pytest.mark.parametrize("config", [None, {}, {"max_tokens_in_buffer": 32}])
@real
async def test_without_a_transceiver(any_site: Site, config: Any) -> None:
    result = any_site.context(any_site.llm(config))
    with pytest.raises(any_site.module.llmapi.RequestError, match="cache_transceiver_config"):
        await result


@real
async def test_the_overlap_scheduler_of_the_oldest(any_site: Site) -> None:
    result = any_site.context(any_site.llm(disable_overlap_scheduler=False))
    if any_site.module.__version__ == VERSIONS[0]:
        with pytest.raises(RuntimeError, match="disable_overlap_scheduler"):
            await result
    else:
        await result


@real
async def test_an_end_of_text_at_once(any_site: Site) -> None:
    llm = any_site.llm()
    result = await any_site.context(llm, sampling=any_site.sampling(end_id=any_site.expected()[0]))
    assert result.outputs[0].finish_reason == "stop"
    assert llm._engine.held == (any_site.module.__version__ in SINCE_1_3)


@real
async def test_a_link_leads_to_one_kv_cache_once(any_site: Site) -> None:
    error = any_site.module.llmapi.RequestError
    ours, theirs = any_site.llm(), any_site.llm()
    link = await any_site.link(ours)
    await any_site.generation(theirs, link)
    again = any_site.generation(theirs, link, streaming=True)
    with pytest.raises(error, match="not held"):
        await anext(again)
    link = await any_site.link(ours)
    with pytest.raises(error, match="of 77 tokens, not 76"):
        await any_site.generation(theirs, link, PROMPT[:-1])
    ours.shutdown()
    with pytest.raises(error, match="tcp://"):
        await any_site.generation(theirs, link)
    assert theirs._engine.used_blocks == 0


@real
async def test_invalid_links(site: Site) -> None:
    error = site.module.llmapi.RequestError
    python, cpp = site.llm("NIXL"), site.llm("UCX")
    link = await site.link(python)
    for wrong in (
        {"first_gen_tokens": None},
        {"ctx_info_endpoint": None},
        {"ctx_dp_rank": None},
        {"ctx_info_endpoint": "tcp://nowhere"},
        {"disagg_request_id": 17},
    ):
        with pytest.raises(error):
            await site.generation(python, dataclasses.replace(link, **wrong))
    with pytest.raises(error, match="transceiver_runtime"):
        await site.generation(cpp, link)
    link = await site.link(cpp)
    with pytest.raises(error, match="opaque_state"):
        await site.generation(cpp, dataclasses.replace(link, opaque_state=b"\xff"))
    with pytest.raises(error, match="transceiver_runtime"):
        await site.generation(python, link)


@real
async def test_ids_of_the_python_transceiver(site: Site) -> None:
    llm = site.llm()
    with pytest.raises(RuntimeError, match="disagg_request_id"):
        await site.context(llm, id=None)
    await site.context(llm, id=1 << 41)
    with pytest.raises(RuntimeError, match="in use"):
        await site.context(llm, id=1 << 41)


@real
async def test_a_kv_cache_that_is_never_taken(any_site: Site) -> None:
    if any_site.module.__version__ == VERSIONS[0]:
        with pytest.raises(ValueError, match="kv_transfer_timeout_ms"):
            any_site.llm({"backend": "NIXL", "kv_transfer_timeout_ms": 50})
    else:
        llm = any_site.llm({"backend": "NIXL", "kv_transfer_timeout_ms": 50})
        link = await any_site.link(llm)
        if any_site.module.__version__ == "1.2.1":
            # It frees nothing by itself (NVIDIA/TensorRT-LLM#12313).
            await asyncio.sleep(0.2)
            assert llm._engine.held == 1
            await any_site.context(llm)
            await asyncio.sleep(0.2)
            assert llm._engine.held == 1, "the second one, and the first is gone"
        else:
            await until(lambda: llm._engine.held == 0)
            assert llm._engine.used_blocks == 0
        with pytest.raises(RuntimeError, match="expired"):
            await any_site.generation(llm, link)
    forever = any_site.llm("UCX")
    await any_site.link(forever)
    await asyncio.sleep(0.1)
    assert forever._engine.held == 1


@real
async def test_held_blocks_keep_others_waiting(site: Site) -> None:
    llm = site.llm(kv_cache_config={"max_tokens": 96})
    link = await site.link(llm)
    second = asyncio.ensure_future(site.context(llm).aresult())
    await asyncio.sleep(0.05)
    assert not second.done()
    await site.generation(site.llm(), link)
    await second


@pytest.mark.parametrize(
    ("difference", "options"),
    [
        ("tokens_per_block", {"kv_cache_config": {"tokens_per_block": 64}}),
        ("layout", {"profile": "{speed: 0, layers: 2}"}),
        ("model", {"profile": "{speed: 0, context_length: 100}"}),
    ],
)
@real
async def test_engines_that_do_not_fit(site: Site, difference: str, options: Any) -> None:
    for backend in ("NIXL", "UCX"):
        link = await site.link(site.llm(backend))
        other = Site(site.module, site.folder)
        if "profile" in options:
            other.folder = site.folder / "other"
            other.folder.mkdir(exist_ok=True)
            (other.folder / "config.json").write_text('{"vocab_size": 997}')
            (other.folder / "profile.yaml").write_text(options["profile"])
        kv = {"kv_cache_config": options.get("kv_cache_config", {"max_tokens": 1024})}
        with pytest.raises(RuntimeError, match=difference):
            await other.generation(other.llm(backend, **kv), link)
        other.close()


# ------------------------------------------------------------------------------------------- faults


@real
async def test_faults(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site.folder / "faults.json"
    monkeypatch.setenv("FAKE_TENSORRT_LLM_FAULTS", str(path))
    ours, theirs = site.llm(), site.llm({"backend": "NIXL", "kv_transfer_timeout_ms": 200})
    path.write_text('[{"at": "context", "nth": 2, "do": "fail"}]')
    link = await site.link(ours)
    with pytest.raises(RuntimeError, match="context 2"):
        await site.context(ours)
    path.write_text('[{"at": "pull", "do": "stall", "seconds": 0.5}]')
    with pytest.raises(RuntimeError, match="within"):
        await site.generation(theirs, link)
    path.write_text('[{"at": "pull", "do": "fail"}]')
    await asyncio.sleep(0.6)
    with pytest.raises(RuntimeError, match="pull 2"):
        await site.generation(theirs, link)
    path.unlink()
    assert (await site.generation(theirs, link)).outputs[0].token_ids == site.expected()
    await until(lambda: ours._engine.held == 0)


@real
async def test_an_abort_in_a_transfer_loses_the_blocks_of_the_context(
    any_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = any_site
    path = site.folder / "faults.json"
    monkeypatch.setenv("FAKE_TENSORRT_LLM_FAULTS", str(path))
    path.write_text('[{"at": "pull", "do": "stall", "seconds": 1.0}]')
    limit = {} if site.module.__version__ == VERSIONS[0] else {"kv_transfer_timeout_ms": 2000}
    ours, theirs = site.llm({"backend": "NIXL", **limit}), site.llm()
    result = site.generation(theirs, await site.link(ours))
    await until(lambda: theirs._engine.used_blocks > 0)
    result.abort()
    await asyncio.sleep(0.1)
    assert theirs._engine.used_blocks > 0
    assert (await result).outputs[0].finish_reason == "cancelled"
    await until(lambda: theirs._engine.used_blocks == 0)
    await asyncio.sleep(2.5)
    await site.context(ours)  # nor does other work free them
    assert ours._engine.held == 2


@real
async def test_an_abort_of_a_computed_context_loses_its_blocks(any_site: Site) -> None:
    limit = {} if any_site.module.__version__ == VERSIONS[0] else {"kv_transfer_timeout_ms": 50}
    llm = any_site.llm({"backend": "NIXL", **limit})
    result = any_site.context(llm)
    await until(lambda: llm._engine.held == 1)
    result.abort()
    await result
    await asyncio.sleep(0.2)
    assert llm._engine.held == 1


# ---------------------------------------------------------------------------------------- processes


class Child:
    """A context engine in a separate process."""

    def __init__(self, folder: Path, runtime: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.context_engine", str(folder), runtime],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str = "") -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def link(self, site: Site, prompt: list[int], id_: int | None) -> Any:
        fields = self.ask(json.dumps([prompt, id_]))
        if fields["opaque_state"]:
            fields["opaque_state"] = base64.b64decode(fields["opaque_state"])
        return site.module.DisaggregatedParams(**{**fields, "request_type": "generation_only"})

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def left(prefix: str) -> list[Path]:
    return list(SHM.glob(f"{prefix}*"))


@pytest.mark.parametrize(
    ("version", "backend", "runtime"),
    [("1.0.0", "UCX", "CPP"), ("1.4.0rc1", "UCX", "CPP"), ("1.4.0rc1", "NIXL", "PYTHON")],
)
@real
async def test_two_processes(
    folder: Path, version: str, backend: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"pdserve-fake-{secrets.token_hex(6)}"
    monkeypatch.setenv("PDSERVE_SHM_PREFIX", prefix)
    with tensorrt_llm(version) as module:
        child, site = Child(folder, runtime), Site(module, folder)
        try:
            llm = site.llm(backend)
            link = child.link(site, PROMPT, (1 << 40) + 1)
            assert child.ask() == 1
            result = await site.generation(llm, link)
            assert result.outputs[0].token_ids == site.expected()
            await until(lambda: child.ask() == 0)
            link = child.link(site, PROMPT, (1 << 40) + 2)
            child.close()
            with pytest.raises(module.llmapi.RequestError, match="tcp://"):
                await site.generation(llm, link)
        finally:
            child.close()
            site.close()
    assert not left(prefix)


@real
async def test_a_context_engine_that_dies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "faults.json"
    monkeypatch.setenv("FAKE_TENSORRT_LLM_FAULTS", str(path))
    with tensorrt_llm() as module:
        child, site = Child(folder, "PYTHON"), Site(module, folder)
        try:
            llm = site.llm()
            link = child.link(site, PROMPT, (1 << 40) + 1)
            path.write_text('[{"at": "pull", "do": "die"}]')
            with pytest.raises(module.llmapi.RequestError, match="gone"):
                await site.generation(llm, link)
            assert child.process.wait(5) == 1
        finally:
            child.close()
            site.close()


# --------------------------------------------------------------------------------- the torch engine


@real
async def test_tokens_are_transformers_own(reference: Reference) -> None:
    model = Path(default_deployment("torch").model)
    with tensorrt_llm() as module:
        site = Site(module, model)
        try:
            ours, theirs = site.llm(dtype="float32"), site.llm(dtype="float32")
            prompt = reference.encode("The capital of France is")
            expected = reference.generate(prompt, TOKENS)
            whole = await theirs.generate_async(prompt, site.sampling())
            assert whole.outputs[0].token_ids == expected
            parted = await site.generation(theirs, await site.link(ours, prompt), prompt)
            assert parted.outputs[0].token_ids == expected
            sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
            whole = await theirs.generate_async(prompt, site.sampling(**sampled))
            link = await site.link(ours, prompt, sampling=site.sampling(**sampled))
            parted = await site.generation(theirs, link, prompt, sampling=site.sampling(**sampled))
            assert parted.outputs[0].token_ids == whole.outputs[0].token_ids
            llm = site.llm(None, skip_tokenizer_init=False)
            sampling = site.module.SamplingParams(max_tokens=TOKENS)
            output = llm.generate("The capital of France is", sampling).outputs[0]
            assert (output.token_ids, output.text) == (expected, reference.decode(expected))
        finally:
            site.close()
