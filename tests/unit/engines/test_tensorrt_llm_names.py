"""Tests that docs/tensorrt-llm.md lists exactly the names of the library that are used."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdctl import network
from pdctl.doctor import variables
from pdctl.paths import ROOT
from pdserve import config
from pdserve.config.llm_options import (
    BACKEND_VARIABLES,
    CacheTransceiverConfig,
    KvCacheConfig,
    LlmArguments,
    LlmOptions,
)
from pdserve.engines.tensorrt_llm import api, sampling
from tests.unit.engines.llm import (
    VERSIONS,
    answer,
    deployment,
    engine,
    installed,
    new_request,
)

if TYPE_CHECKING:
    from pathlib import Path

TABLE = re.compile(r"^\| ([\w ,*\\]+) \| (.+) \| ([^|]+) \|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """Return the names of the table by kind."""
    text = (ROOT / "docs" / "tensorrt-llm.md").read_text()
    _, _, section = text.partition("## Every name that is used")
    found: dict[str, set[str]] = defaultdict(set)
    for kind, names, source in TABLE.findall(section):
        if kind in ("kind", "---"):
            continue
        assert source.strip(), kind
        found[kind] |= set(re.findall(r"`([^`]+)`", names))
    return found


class RecordingProxy:
    """A proxy for an object of TensorRT-LLM, which records the attributes that are read."""

    def __init__(self, kind: str, of: Any, notes: dict[str, set[str]]) -> None:
        self.__dict__.update(_kind=kind, _of=of, _notes=notes)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        if name.startswith("__"):
            return value
        self._notes[self._kind].add(name)
        if name == "outputs":
            return [RecordingProxy("CompletionOutput", one, self._notes) for one in value]
        if name == "generate_async":
            return self._generate_async
        if name.startswith("get_"):
            return self._get(value)
        return value

    def _generate_async(self, **arguments: Any) -> RecordingProxy:
        self._notes["argument of generate_async"] |= set(arguments)
        return RecordingProxy("result", self._of.generate_async(**arguments), self._notes)

    def _get(self, method: Any) -> Any:
        def get(**arguments: Any) -> Any:
            self._notes[r"argument of get_\*"] |= set(arguments)
            return method(**arguments)

        return get

    def __aiter__(self) -> Any:
        self._notes[self._kind].add("async for")
        results = self._of.__aiter__()

        async def iterate() -> Any:
            async for one in results:
                yield RecordingProxy("result", one, self._notes)

        return iterate()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_used_of_the_api_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    notes: dict[str, set[str]] = defaultdict(set)
    there = table()
    pool = KvCacheConfig(event_buffer_max_size=64)
    arguments = LlmArguments(enable_iter_perf_stats=True, kv_cache_config=pool)
    with installed(version):
        made = api.Api(())
        for kind, name in (
            ("argument of LLM", "llm"),
            ("SamplingParams", "sampling_params"),
            ("DisaggregatedParams", "disaggregated_params"),
            ("KvCacheConfig", "kv_cache_config"),
            ("CacheTransceiverConfig", "cache_transceiver_config"),
        ):
            notes["class"].add(getattr(made, name).__name__)
            monkeypatch.setattr(made, name, recording(kind, getattr(made, name), notes))
        monkeypatch.setattr("pdserve.engines.tensorrt_llm.engine.Api", lambda gpus: made)
        wanted = deployment(tmp_path, LlmOptions(prefill=arguments, decode=arguments))
        prefill, decode = engine("prefill", wanted), engine("decode", wanted)
        for one in (prefill, decode):
            one._llm = RecordingProxy("method of LLM", one._llm, notes)

        async def run() -> None:
            request = new_request(salt="alice")
            context = await prefill.context(request, keep=True)
            await answer(decode, request, context.token, context.link)
            for one in (prefill, decode):
                await one.report()
                await one.close()
            task = asyncio.create_task(prefill.context(new_request(1), keep=True))
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(run())

    # an attribute of a request that has not ended; tests of cancellation read it
    notes["result"].add("abort")
    notes["class"] |= {path.partition(".")[0] for path in api.NEEDED}
    if not made.has_salts:
        notes["argument of generate_async"].add("cache_salt")
    for kind, names in notes.items():
        assert names <= there[kind], kind
    for kind in (
        *("class", "method of LLM", "argument of generate_async", "result", "CompletionOutput"),
    ):
        assert notes[kind] == there[kind], kind


def recording(kind: str, of: Any, notes: dict[str, set[str]]) -> Any:
    def make(**arguments: Any) -> Any:
        # Every field of another engine's link is passed on, known or not.
        if arguments.get("request_type") != "generation_only":
            notes[kind] |= set(arguments)
        return of(**arguments)

    return make


def test_options_and_sampling_are_in_the_table() -> None:
    there = table()
    fixed = {
        *("model", "backend", "skip_tokenizer_init", "tensor_parallel_size", "max_batch_size"),
        *("kv_cache_config", "cache_transceiver_config"),
    }
    assert there["argument of LLM"] == fixed | set(LlmArguments.__struct_fields__)
    assert there["KvCacheConfig"] == set(KvCacheConfig.__struct_fields__)
    assert there["CacheTransceiverConfig"] == {
        *CacheTransceiverConfig.__struct_fields__,
        "kv_transfer_timeout_ms",
    }
    for path, names in api.NEEDED.items():
        if path in there:
            assert set(names) <= there[path], path
    assert there["SamplingParams"] == {*sampling.NEEDED, sampling.IGNORED_PROMPT}


def linked_by(given: config.Network) -> config.Deployment:
    """Return the environment of a deployment on two hosts."""
    hosts = ("10.0.0.1", "10.0.0.2")
    servers = tuple(config.Server(f"s{number}", host) for number, host in enumerate(hosts))
    return config.Deployment("m", servers, transfer=config.Transfer(network=given))


def test_variables_are_in_the_table() -> None:
    """The table lists the variables that are set for UCX and TensorRT-LLM anywhere in the code."""
    there, read = table()["environment, set"], table()["environment, read"]
    assert read == {*BACKEND_VARIABLES, *variables.NO_STATISTICS}
    everything = config.Network(("a",), 1, 2, 3, "eth0")
    assert there == {*network.variables(linked_by(everything)), *api.GPUS}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "python_backends", "tools"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    used = set()
    for name in listed:
        if (ROOT / name).suffix == ".py":
            used |= set(re.findall(r'"((?:TRTLLM|TLLM)_[A-Z0-9_]+)"', (ROOT / name).read_text()))
    assert used <= there | read


def test_the_deployments_that_are_shown() -> None:
    """The deployments in the document can be read unchanged, and each has the engine it claims."""
    kinds = {
        path.stem: config.load(path).engine.kind for path in (ROOT / "deployments").glob("*.yaml")
    }
    assert kinds["one-host-two-gpus"] == kinds["two-hosts-roce"] == "tensorrt_llm"
    assert kinds["tp2-prefill-tp4-decode"] == "tensorrt_llm"
    roce = config.load(ROOT / "deployments" / "two-hosts-roce.yaml")
    assert network.variables(roce) == {
        "UCX_NET_DEVICES": "mlx5_0:1",
        "UCX_IB_GID_INDEX": "3",
        "UCX_IB_TRAFFIC_CLASS": "106",
        "UCX_MAX_RNDV_RAILS": "1",
        "TRTLLM_UCX_INTERFACE": "eth0",
        "TRTLLM_NIXL_INTERFACE": "eth0",
    }
    assert network.variables(linked_by(config.Network())) == {}
    with pytest.raises(msgspec.ValidationError, match="gid_index"):
        msgspec.convert({"gid_index": 300}, config.Network)
