"""Tests for the ``tensorrt_llm`` engine over a fake of the library: each version, each link."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import operator
import os
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from pdserve import config, errors
from pdserve.config.llm_options import (
    CacheTransceiverConfig,
    KvCacheConfig,
    LlmArguments,
    LlmOptions,
)
from pdserve.engines import build
from pdserve.engines.tensorrt_llm import api, link, sampling
from pdserve.sampling import Sampling
from tests.unit.engines.llm import (
    PROMPT,
    SINCE_1_3,
    VERSIONS,
    answer,
    deployment,
    engine,
    installed,
    new_request,
    runtime,
)
from tests.unit.inprocess import EOS, model

if TYPE_CHECKING:
    pass

# Each version, and both transceivers for the newest one.
VARIANTS = [(version, None) for version in VERSIONS] + [("1.4.0rc1", "CPP")]


@pytest.mark.parametrize(("version", "kind"), VARIANTS)
def test_context_and_generation(tmp_path: Path, version: str, kind: Any) -> None:
    """The adapter treats the links of the C++ transceiver and of the Python one alike."""
    with installed(version):
        wanted = deployment(tmp_path, runtime(kind))
        prefill, decode = engine("prefill", wanted), engine("decode", wanted)
        expected = model(tmp_path)

        async def run() -> None:
            request = new_request()
            context = await prefill.context(request._replace(max_tokens=1), keep=True)
            assert context.token == expected.token(PROMPT, 0)
            assert not context.eos
            fields = msgspec.msgpack.decode(context.link)
            python = version in SINCE_1_3 and kind is None
            assert ("opaque_state" in fields) != python
            assert ("ctx_info_endpoint" in fields) == python
            ids = await answer(decode, request, context.token, context.link)
            assert [context.token, *ids] == [expected.token(PROMPT, i) for i in range(8)]
            # The KV cache is gone: a late request fails, and no other one does.
            with pytest.raises(errors.InstanceError, match="generation"):
                await answer(decode, request, context.token, context.link)
            whole = await answer(decode, request, None, b"")
            assert whole == [context.token, *ids]
            await prefill.close()
            await decode.close()

        asyncio.run(run())
        assert prefill.fingerprint == decode.fingerprint


@pytest.mark.parametrize("version", SINCE_1_3, indirect=True)
def test_ids_are_never_the_same(tmp_path: Path, version: str) -> None:
    prefill = engine("prefill", deployment(tmp_path))

    async def run() -> None:
        made = [await prefill.context(new_request(1), keep=True) for _ in range(3)]
        ids = [msgspec.msgpack.decode(one.link)["disagg_request_id"] for one in made]
        assert len(set(ids)) == 3
        assert all(1 << 40 <= one < 1 << 63 for one in ids)
        await prefill.close()

    asyncio.run(run())


@pytest.mark.parametrize("version", VERSIONS[1:], indirect=True)
def test_a_kv_cache_that_nobody_takes_is_let_go_of(tmp_path: Path, version: str) -> None:
    """The engine frees it after the lease, and a late request gets an error."""
    wanted = deployment(tmp_path)
    prefill, decode = engine("prefill", wanted), engine("decode", wanted)

    async def run() -> None:
        context = await prefill.context(new_request(1), keep=True)
        assert prefill.keeps_s == wanted.prefill.lease_s
        await asyncio.sleep(prefill.keeps_s + 0.3)
        with pytest.raises(errors.InstanceError):
            await answer(decode, new_request(), context.token, context.link)
        await prefill.close()
        await decode.close()

    asyncio.run(run())


def test_without_a_time_limit_it_is_kept_for_ever_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with installed("1.0.0"):
        prefill = engine("prefill", deployment(tmp_path))
        assert prefill.keeps_s == float("inf")
        assert "keeps for ever" in caplog.text
        asyncio.run(prefill.close())


def test_a_request_that_only_wants_its_first_token_leaves_nothing(
    tmp_path: Path, version: str
) -> None:
    prefill = engine("prefill", deployment(tmp_path))

    async def run() -> None:
        context = await prefill.context(new_request(1), keep=False)
        assert context.link == b""
        assert context.token == model(tmp_path).token(PROMPT, 0)
        await prefill.close()

    asyncio.run(run())


def test_cancelled_is_aborted(tmp_path: Path, version: str) -> None:
    wanted = deployment(tmp_path)
    Path(tmp_path / "profile.yaml").write_text("{speed: 1, decode: {base_ms: 5}}")
    decode = engine("decode", wanted)
    aborted = []
    llm = decode._llm
    begin = llm.generate_async

    def generate_async(**arguments: Any) -> Any:
        output = begin(**arguments)
        abort = output.abort
        output.abort = lambda: (aborted.append(output), abort())
        return output

    llm.generate_async = generate_async

    async def run() -> None:
        async with aclosing(decode.generate(new_request(500), None, b"")) as pieces:
            async for _ in pieces:
                break
        assert len(aborted) == 1
        task = asyncio.create_task(decode.context(new_request(1, np.arange(3, 900)), keep=False))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(aborted) == 2
        await answer(decode, new_request(3), None, b"")
        assert len(aborted) == 2, "a request that has ended is not aborted"
        await decode.close()

    asyncio.run(run())


def test_a_closed_engine_refuses(tmp_path: Path, version: str) -> None:
    decode = engine("decode", deployment(tmp_path))

    async def run() -> None:
        await decode.close()
        with pytest.raises(errors.InstanceError, match="shutting down"):
            await answer(decode, new_request(), None, b"")

    asyncio.run(run())


def test_blocks_and_events_of_the_engine(tmp_path: Path, version: str) -> None:
    pool = KvCacheConfig(event_buffer_max_size=64, enable_block_reuse=True)
    arguments = LlmArguments(enable_iter_perf_stats=True, kv_cache_config=pool)
    decode = engine("decode", deployment(tmp_path, LlmOptions(decode=arguments)))

    async def run() -> None:
        await answer(decode, new_request(40), None, b"")
        report = await decode.report()
        assert set(report.blocks) == {"used", "free"}
        assert report.blocks["free"] > 0
        assert sum(report.events.values()) > 0
        await decode.close()

    asyncio.run(run())


# ----------------------------------------------------------------------------------------- sampling


def test_every_kind_of_sampling_is_mapped() -> None:
    """A sampling field that pdserve adds and the adapter does not map fails this test."""
    mapped = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 3,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
    }
    assert set(mapped) == set(Sampling.__struct_fields__)
    request = new_request(sampling=Sampling(**mapped), ignore_eos=True)
    given = sampling.arguments(request, [EOS], sampling.NEEDED)
    assert {name: given[name] for name in mapped} == mapped
    assert given["ignore_eos"]
    assert set(given) <= set(sampling.NEEDED)


def test_greedy_is_said_by_top_k_and_sampling_by_top_p() -> None:
    """The adapter sets both, because a temperature alone samples in some versions only."""
    greedy = sampling.arguments(new_request(), [EOS, 7], sampling.NEEDED)
    assert greedy["top_k"] == 1
    assert "temperature" not in greedy
    assert (greedy["end_id"], greedy["stop_token_ids"]) == (EOS, [7])
    assert greedy["include_stop_str_in_output"]
    free = sampling.arguments(
        new_request(sampling=Sampling(temperature=1.5)), [EOS], sampling.NEEDED
    )
    assert (free["temperature"], free["top_p"]) == (1.5, 1.0)
    assert "top_k" not in free


def test_penalties_count_the_answer_alone_where_that_can_be_said() -> None:
    request = new_request(sampling=Sampling(presence_penalty=1.0), resumed_tokens=5)
    fields = (*sampling.NEEDED, "prompt_ignore_length")
    given = sampling.arguments(request, [EOS], fields)
    assert given["prompt_ignore_length"] == len(PROMPT) - 5
    assert "prompt_ignore_length" not in sampling.arguments(request, [EOS], sampling.NEEDED)


def test_what_is_given_is_taken_by_every_version(version: str) -> None:
    made = api.Api(())
    request = new_request(sampling=Sampling(0.5, 3, 0.5, 1, 1.1, 0.1, 0.1))
    made.sampling_params(**sampling.arguments(request, [2, 3], made.sampling_fields))


def test_each_call_has_parameters_of_its_own(tmp_path: Path, version: str) -> None:
    """Parameters are not shared between calls, since context_only writes to them."""
    prefill = engine("prefill", deployment(tmp_path))
    seen = []
    begin = prefill._llm.generate_async

    def generate_async(**arguments: Any) -> Any:
        seen.append(arguments["sampling_params"])
        return begin(**arguments)

    prefill._llm.generate_async = generate_async

    async def run() -> None:
        request = new_request(5)
        for _ in range(2):
            await prefill.context(request, keep=True)
        assert request.max_tokens == 5
        await prefill.close()

    asyncio.run(run())
    assert seen[0] is not seen[1]
    assert [one.max_tokens for one in seen] == [1, 1]


# ----------------------------------------------------------------------------------------- the link


@dataclasses.dataclass
class Params:
    """A future version of DisaggregatedParams."""

    request_type: str | None = None
    opaque_state: bytes | None = None
    ctx_request_id: int | None = None
    something_new: dict[str, Any] | None = None
    endpoints: list[str] | None = None


def test_every_field_goes_over_whatever_it_is() -> None:
    params = Params("context_only", bytes(range(256)), (1 << 63) - 1, {"a": [1.5]}, ["h:1", "h:2"])
    there = link.unpack(link.pack(params), Params, "generation_only")
    assert there == dataclasses.replace(params, request_type="generation_only")


def test_invalid_links() -> None:
    with pytest.raises(errors.HandleError, match="cannot be passed on"):
        link.pack(Params(something_new={"tensor": object()}))
    for data in (b"", b"\xc1", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"other": 1})):
        with pytest.raises(errors.HandleError):
            link.unpack(data, Params, "generation_only")


# ------------------------------------------------------------------------------------------ the API


NEWER, UNKNOWN = ("1.4.0rc5", "1.4.0", "2.0"), ("main", "")


@pytest.mark.parametrize("number", [*NEWER, *UNKNOWN])
def test_a_version_that_was_not_read_is_tried_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: str
) -> None:
    with installed("1.4.0rc1"):
        monkeypatch.setattr(importlib.import_module("tensorrt_llm"), "__version__", number)
        assert api.Api(()).version == number
        assert f"tensorrt_llm {number!r} is none of the versions that were read" in caplog.text


@pytest.mark.parametrize("number", ["1.0.0", "1.1", "1.2.1", "1.3.0rc29", "1.3.9", "1.4.0rc1"])
def test_versions_that_were_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: str
) -> None:
    with installed("1.4.0rc1"):
        monkeypatch.setattr(importlib.import_module("tensorrt_llm"), "__version__", number)
        api.Api(())
        assert not caplog.text


@pytest.mark.parametrize(
    ("where", "name", "words"),
    [
        ("llmapi", "KvCacheConfig", "0.21.0 has no KvCacheConfig;"),
        ("llmapi", "TorchLlmArgs", "0.21.0 has no TorchLlmArgs;"),
        ("llmapi.LLM", "shutdown", "0.21.0 has no LLM.shutdown;"),
        ("llmapi.RequestOutput", "abort", "0.21.0 has no RequestOutput.abort;"),
    ],
)
def test_a_name_that_is_missing_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, where: str, name: str, words: str
) -> None:
    """Versions below 1.0 are refused for what they lack, and not for their number."""
    with installed("1.4.0rc1"):
        package = importlib.import_module("tensorrt_llm")
        monkeypatch.setattr(package, "__version__", "0.21.0")
        of = operator.attrgetter(where)(package)
        for owner in of.__mro__ if isinstance(of, type) else (of,):
            if name in vars(owner):
                monkeypatch.delattr(owner, name)
        with pytest.raises(errors.DeploymentError, match=words):
            api.Api(())


def test_all_fields_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Few:
        request_type: str | None = None
        temperature: float = 1.0

    def generate_async(self: Any, inputs: Any, sampling_params: Any, streaming: bool) -> None: ...

    with installed("1.4.0rc1"):
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        monkeypatch.setattr(llmapi, "DisaggregatedParams", Few)
        monkeypatch.setattr(llmapi.LLM, "generate_async", generate_async)
        with pytest.raises(
            errors.DeploymentError,
            match=r"LLM\.generate_async\.disaggregated_params, "
            r"DisaggregatedParams\.ctx_request_id;",
        ):
            api.Api(())


def test_not_installed(tmp_path: Path) -> None:
    with pytest.raises(errors.DeploymentError, match="cannot be imported"):
        engine("prefill", deployment(tmp_path))


def test_gpus_and_mpi_before_the_import() -> None:
    with installed("1.4.0rc1") as patch:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_FD", "OMPI_MCA_orte_x", "ORTE_Y"):
            patch.setenv(name, "1")
        patch.setenv("OMPI_MCA_btl", "tcp")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        patch.setenv("TRTLLM_VISIBLE_DEVICES", "")
        api.Api((2, 3))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
        left = [name for name in os.environ if name.startswith(("OMPI_", "PMI", "ORTE_"))]
        assert left == ["OMPI_MCA_btl"]


def test_what_this_version_does_not_have_is_refused(tmp_path: Path) -> None:
    options = LlmOptions(CacheTransceiverConfig(kv_cache_bounce_size_mb=64))
    with (
        installed("1.2.1"),
        pytest.raises(
            errors.DeploymentError,
            match=r"kv_cache_bounce_size_mb: tensorrt_llm 1.2.1 has no such option; allowed: back",
        ),
    ):
        engine("prefill", deployment(tmp_path, options))


def test_versions_and_layouts_that_cannot_exchange_differ(tmp_path: Path) -> None:
    prints = set()
    variants = [
        ("1.2.1", LlmOptions()),
        ("1.4.0rc1", LlmOptions()),
        ("1.4.0rc1", runtime("CPP")),
        ("1.4.0rc1", LlmOptions(prefill=LlmArguments(kv_cache_config=KvCacheConfig(dtype="fp8")))),
        (
            "1.4.0rc1",
            LlmOptions(prefill=LlmArguments(kv_cache_config=KvCacheConfig(tokens_per_block=64))),
        ),
    ]
    for version, options in variants:
        with installed(version):
            made = engine("prefill", deployment(tmp_path, options))
            prints.add(made.fingerprint)
            asyncio.run(made.close())
    assert len(prints) == len(variants)
    assert all(one.isascii() and len(one) <= 128 and " " not in one for one in prints)


def test_stop_words_of_a_model_with_several_ends(tmp_path: Path, version: str) -> None:
    """The other end tokens are passed as stop tokens and end an answer, too."""
    expected = model(tmp_path)
    wanted = deployment(tmp_path)
    third = expected.token(PROMPT, 3)
    ends = {"eos_token_id": [EOS, third]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    decode = engine("decode", wanted)

    async def run() -> None:
        ids = await answer(decode, new_request(8), None, b"")
        assert ids == [expected.token(PROMPT, i) for i in range(4)]
        await decode.close()

    asyncio.run(run())


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensorrt_llm: {prefill: {max_token: 3}}", "max_token"),
        ("tensorrt_llm: {cache_transceiver_config: {backend: nixl}}", "nixl"),
        (
            "tensorrt_llm: {cache_transceiver_config: {kv_transfer_timeout_ms: 5}}",
            "'kv_transfer_timeout_ms'.*; set prefill.lease_s, seconds; allowed: ",
        ),
        (
            "tensorrt_llm: {decode: {tensor_parallel_size: 2}}",
            "'tensor_parallel_size'.*; set decode.tensor_parallel; allowed: ",
        ),
        (
            "tensorrt_llm: {prefill: {max_batch_size: 2}}",
            "'max_batch_size'.*; set prefill.slots; allowed: ",
        ),
        ("tensorrt_llm: {decode: {backend: pytorch}}", "'backend'.*; it is always pytorch; allow"),
        ("tensorrt_llm: {decode: {kv_cache_config: {tokens_per_block: 64}}}", "tokens_per_block"),
        ("tensorrt_llm: {decode: {dtype: float16}}", "dtype is auto of prefill and float16"),
        (
            "tensorrt_llm: {cache_transceiver_config: {max_tokens_in_buffer: 100}}",
            "100 is no multiple of tokens_per_block, 32",
        ),
        ("gpus: {prefill_9: [0]}", "there is no instance prefill_9"),
        ("gpus: {prefill_0: [0, 1]}", "prefill_0 has 2; a prefill has 1 ranks"),
        ("models: {prefill_0: {address: 'a:1', model: m}}", "is of kind tensorrtllm_backend"),
    ],
)
def test_options_are_checked_before_anything_starts(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: m\n"
        "servers: [{name: a, prefill: [prefill_0], decode: [decode_0]}]\n"
        f"engine:\n  kind: tensorrt_llm\n  {text}\n"
    )
    with pytest.raises(errors.DeploymentError, match=words.replace("(", r"\(")):
        config.load(file)


def test_options_of_another_kind_of_engine_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: m\n"
        "servers: [{name: a, prefill: [prefill_0], decode: [decode_0]}]\n"
        "engine: {tensorrt_llm: {decode: {max_seq_len: 9}}}\n"
    )
    with pytest.raises(errors.DeploymentError, match="this deployment's kind of engine is torch"):
        config.load(file)


def test_the_longest_answer_is_what_both_roles_take(tmp_path: Path) -> None:
    wanted = deployment(tmp_path)
    assert build.longest(wanted) == 4096
    short = LlmOptions(decode=LlmArguments(max_seq_len=1000))
    wanted = msgspec.structs.replace(
        wanted, engine=msgspec.structs.replace(wanted.engine, tensorrt_llm=short)
    )
    assert build.longest(wanted) == 1000
