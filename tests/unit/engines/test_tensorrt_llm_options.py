"""Tests of what the ``tensorrt_llm`` engine is made with, in each version of the fake."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve import config, errors
from pdserve.config.llm_options import (
    CacheTransceiverConfig,
    KvCacheConfig,
    LlmArguments,
    LlmOptions,
)
from pdserve.engines.tensorrt_llm import api, options
from tests.unit.engines.llm import (
    SINCE_1_3,
    answer,
    deployment,
    engine,
    installed,
    new_request,
    runtime,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.engines.tensorrt_llm.engine import TensorRTLLM


def made(role: config.Role, wanted: config.Deployment) -> Any:
    """Return the arguments with which the engine of a role makes its LLM."""
    one = engine(role, wanted)
    try:
        return one._llm.args
    finally:
        asyncio.run(one.close())


def salted(one: TensorRTLLM, seen: list[Any]) -> None:
    """Note the ``cache_salt`` of each request of an engine; "none": it was not given."""
    begin = one._llm.generate_async

    def generate_async(**arguments: Any) -> Any:
        seen.append(arguments.get("cache_salt", "none"))
        return begin(**arguments)

    one._llm.generate_async = generate_async


# ------------------------------------------------------------------------------------------ tenants


def test_tenants_share_no_cached_prefix(tmp_path: Path, version: str) -> None:
    """Both roles give the tenant as salt; where they cannot, nothing is reused."""
    wanted = deployment(tmp_path)
    prefill, decode = engine("prefill", wanted), engine("decode", wanted)
    seen: list[Any] = []
    salted(prefill, seen)
    salted(decode, seen)

    async def run() -> None:
        for tenant in ("alice", ""):
            request = new_request(salt=tenant)
            context = await prefill.context(request, keep=True)
            await answer(decode, request, context.token, context.link)
            await answer(decode, request, None, b"")
        await prefill.close()
        await decode.close()

    asyncio.run(run())
    has_salts = version != "1.0.0"
    assert seen == (["alice"] * 3 if has_salts else ["none"] * 3) + ["none"] * 3
    for one in (prefill, decode):
        assert one._llm.args.kv_cache_config.enable_block_reuse is has_salts


def test_reuse_without_salts_is_a_choice_that_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = KvCacheConfig(enable_block_reuse=True)
    with installed("1.0.0"):
        made("prefill", deployment(tmp_path))
        assert "cannot keep the cached prefixes of tenants apart: none is reused" in caplog.text
        caplog.clear()
        chosen = LlmOptions(prefill=LlmArguments(kv_cache_config=pool))
        assert made("prefill", deployment(tmp_path, chosen)).kv_cache_config.enable_block_reuse
        assert "tenants can find out what others have asked" in caplog.text


# -------------------------------------------------------------------------------------- transceiver


def test_the_transceiver_unless_one_is_asked_for(tmp_path: Path, version: str) -> None:
    """NIXL by name, since DEFAULT depends on each server's environment; the version's runtime."""
    chosen = made("decode", deployment(tmp_path)).cache_transceiver_config
    assert chosen.backend == "NIXL"
    if version in SINCE_1_3:
        assert chosen.transceiver_runtime == "auto"
    else:
        assert not hasattr(chosen, "transceiver_runtime")


@pytest.mark.parametrize("kind", ["CPP", "PYTHON", "auto"])
def test_a_runtime_that_is_asked_for(tmp_path: Path, version: str, kind: str) -> None:
    wanted = deployment(tmp_path, runtime(kind))
    if version in SINCE_1_3:
        assert made("decode", wanted).cache_transceiver_config.transceiver_runtime == kind
    else:
        with pytest.raises(errors.DeploymentError, match="transceiver_runtime: tensorrt_llm 1"):
            engine("decode", wanted)


def test_a_runtime_without_auto_is_left_to_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed("1.3.0rc29"):
        monkeypatch.setattr(api, "choices", lambda of, field: ("CPP", "PYTHON"))
        chosen = made("decode", deployment(tmp_path)).cache_transceiver_config
        assert chosen.transceiver_runtime == "auto", "the fake's default: nothing was given"
        with pytest.raises(errors.DeploymentError, match="has no auto; allowed: CPP, PYTHON"):
            engine("decode", deployment(tmp_path, runtime("auto")))


def test_variables_that_disagree_with_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with installed("1.4.0rc1"):
        monkeypatch.setenv("TRTLLM_USE_UCX_KVCACHE", "1")
        made("decode", deployment(tmp_path))
        assert (
            "TRTLLM_USE_UCX_KVCACHE is set, but the backend of the cache transceiver is NIXL"
            in (caplog.text)
        )
        caplog.clear()
        default = deployment(tmp_path, LlmOptions(CacheTransceiverConfig(backend="DEFAULT")))
        one = engine("decode", default)
        assert "TRTLLM_USE_UCX_KVCACHE chooses the backend of the cache transceiver, UCX" in (
            caplog.text
        )
        monkeypatch.delenv("TRTLLM_USE_UCX_KVCACHE")
        other = engine("decode", default)
        assert one.fingerprint != other.fingerprint, "a pair of them exchanges nothing"
        for each in (one, other):
            asyncio.run(each.close())


# -------------------------------------------------------------------------------------------- lease


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("torch", 30), ("emulated", 30), ("tensorrt_llm", 60), ("tensorrtllm_backend", 60)],
)
def test_the_lease_unless_one_is_given(kind: Any, expected: float) -> None:
    servers = (config.Server("local", prefill=("prefill_0",), decode=("decode_0",)),)
    engine_kind = config.Engine(kind=kind)
    assert config.Deployment("m", servers, engine_kind).prefill.kept_s == expected
    given = config.Deployment("m", servers, engine_kind, prefill=config.Prefill(lease_s=45))
    assert given.prefill.kept_s == 45


@pytest.mark.parametrize("lease_s", [None, 59.0, 600.0])
def test_the_lease_is_the_time_limit_of_a_transfer(
    tmp_path: Path, lease_s: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with installed("1.4.0rc1"):
        limits = config.Prefill(lease_s=lease_s)
        wanted = msgspec.structs.replace(deployment(tmp_path), prefill=limits)
        chosen = made("prefill", wanted).cache_transceiver_config
        assert chosen.kv_transfer_timeout_ms == int((lease_s or 60) * 1000)
        assert ("prefill.lease_s: 59 is also the time limit" in caplog.text) == (lease_s == 59.0)


# ------------------------------------------------------------------------------------ other options

PASSED = LlmArguments(
    moe_expert_parallel_size=1,
    moe_config={"backend": "CUTLASS"},
    cuda_graph_config={"enable_padding": True},
    trust_remote_code=True,
    enable_early_first_token_response=True,
    scheduler_config={"waiting_queue_policy": "priority"},
    kv_cache_config=KvCacheConfig(
        max_gpu_total_bytes=1 << 34,
        disk_cache_size=1 << 40,
        disk_cache_path="/cache",
        block_reuse_config={"policy": "per_request"},
        mamba_state_config={"periodic_snapshot_interval": 256},
        use_kv_cache_manager_v2=True,
    ),
)


@pytest.mark.parametrize("version", SINCE_1_3, indirect=True)
def test_options_are_passed_on_by_name(tmp_path: Path, version: str) -> None:
    decode = msgspec.structs.replace(
        PASSED, speculative_config={"decoding_type": "MTP", "num_nextn_predict_layers": 1}
    )
    wanted = deployment(tmp_path, LlmOptions(prefill=PASSED, decode=decode))
    for role, given in (("prefill", PASSED), ("decode", decode)):
        found = made(role, wanted)  # type: ignore[arg-type]
        for name, value in given.given().items():
            assert getattr(found, name) == value, name
        for name, value in msgspec.to_builtins(given.kv_cache_config).items():
            assert getattr(found.kv_cache_config, name) == value, name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"enable_early_first_token_response": True}, "decode.enable_early_first_token_response"),
        ({"kv_cache_config": KvCacheConfig(disk_cache_size=1)}, "kv_cache_config.disk_cache_size"),
    ],
)
def test_a_version_without_an_option_refuses_it_by_name(
    tmp_path: Path, arguments: dict[str, Any], name: str
) -> None:
    wanted = deployment(tmp_path, LlmOptions(decode=LlmArguments(**arguments)))
    with (
        installed("1.2.1"),
        pytest.raises(errors.DeploymentError, match=rf"{name}: tensorrt_llm 1\.2\.1 has no such"),
    ):
        engine("decode", wanted)


def test_no_cuda_graphs_can_be_asked_for(tmp_path: Path) -> None:
    """Null is a value of that option, and not the same as no value."""
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: m\n"
        "servers: [{name: a, prefill: [prefill_0], decode: [decode_0]}]\n"
        "engine: {kind: tensorrt_llm, tensorrt_llm: {decode: {cuda_graph_config: null}}}\n"
    )
    read = config.load(file).engine.tensorrt_llm
    assert read.decode.given() == {"cuda_graph_config": None}
    assert read.prefill.given() == {}


def test_experts_are_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    """How they are shared out leaves the KV caches as they are; the pool's manager does not."""
    variants = [
        LlmArguments(),
        LlmArguments(moe_expert_parallel_size=1, moe_config={"backend": "CUTLASS"}),
        LlmArguments(kv_cache_config=KvCacheConfig(use_kv_cache_manager_v2=True)),
    ]
    with installed("1.4.0rc1"):
        prints = []
        for arguments in variants:
            one = engine("decode", deployment(tmp_path, LlmOptions(decode=arguments)))
            prints.append(one.fingerprint)
            asyncio.run(one.close())
    assert prints[0] == prints[1] != prints[2]


def test_backends_by_environment() -> None:
    default = CacheTransceiverConfig(backend="DEFAULT")
    assert options.backend(default, {}) == "NIXL"
    assert options.backend(default, {"TRTLLM_USE_MPI_KVCACHE": "1"}) == "MPI"
    both = {"TRTLLM_USE_MPI_KVCACHE": "1", "TRTLLM_USE_UCX_KVCACHE": "1"}
    assert options.backend(default, both) == "UCX"
    assert options.backend(default, {"TRTLLM_USE_UCX_KVCACHE": "0"}) == "NIXL"
    assert options.backend(CacheTransceiverConfig(), both) == "NIXL"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "prefill: {speculative_config: {decoding_type: MTP}}",
            "prefill.speculative_config.*allowed: engine.tensorrt_llm.decode.speculative_config",
        ),
        (
            "decode: {kv_cache_config: {use_kv_cache_manager_v2: true}}",
            "use_kv_cache_manager_v2 is None of prefill and True of decode",
        ),
        (
            "cache_transceiver_config: {backend: UCX, transceiver_runtime: PYTHON}",
            "PYTHON needs the backend NIXL, not UCX",
        ),
        (
            "cache_transceiver_config: {enable_pipelined_transfer: true}",
            "enable_pipelined_transfer: it needs",
        ),
        ("decode: {kv_cache_config: {disk_cache_size: -1}}", "disk_cache_size"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "model: m\n"
        "servers: [{name: a, prefill: [prefill_0], decode: [decode_0]}]\n"
        f"engine:\n  kind: tensorrt_llm\n  tensorrt_llm: {{{text}}}\n"
    )
    with pytest.raises(errors.DeploymentError, match=words):
        config.load(file)
