"""Tests for ``servers[].flexible``: the allowed names and engines, and errors that say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve import config
from pdserve.errors import DeploymentError

if TYPE_CHECKING:
    from pathlib import Path

SERVER = {
    "name": "local",
    "prefill": ["prefill_0"],
    "decode": ["decode_0", "decode_1"],
    "flexible": ["prefill_0", "decode_1"],
}
NO_OVERLAP = {"disable_overlap_scheduler": True}


def load(folder: Path, server: dict[str, Any], **sections: Any) -> config.Deployment:
    file = folder / "deployment.yaml"
    file.write_bytes(
        msgspec.yaml.encode({"model": "m", "servers": [{**SERVER, **server}], **sections})
    )
    return config.load(file)


@pytest.mark.parametrize("kind", ["torch", "emulated"])
def test_some_instances_may_change_roles(tmp_path: Path, kind: str) -> None:
    deployment = load(tmp_path, {}, engine={"kind": kind})
    assert deployment.flexible == {"prefill_0", "decode_1"}
    assert list(deployment.instances("prefill")) == ["prefill_0"], "its first role"
    assert list(deployment.instances("decode")) == ["decode_0", "decode_1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["decode_9"], r"servers\.local\.flexible: decode_9; allowed: .* prefill_0, decode_0, dec"),
        (["decode_0", "decode_0"], "servers.local.flexible: decode_0 is named more than once"),
    ],
)
def test_only_a_servers_own_instances(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        load(tmp_path, {"flexible": names})


def test_a_model_of_another_server_has_one_role(tmp_path: Path) -> None:
    models = {
        name: {"address": "127.0.0.1:9001", "model": "m"}
        for name in ("prefill_0", "decode_0", "decode_1")
    }
    engine = {"kind": "tensorrtllm_backend", "models": models}
    assert not load(tmp_path, {"flexible": []}, engine=engine).flexible
    with pytest.raises(
        DeploymentError, match=r"flexible: decode_1, prefill_0: .* torch, emulated and tensorrt_llm"
    ):
        load(tmp_path, {}, engine=engine)


def tensorrt_llm(prefill: dict[str, Any], decode: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "tensorrt_llm", "tensorrt_llm": {"prefill": prefill, "decode": decode}}


@pytest.mark.parametrize("prefill", [{}, NO_OVERLAP])
def test_tensorrt_llm_with_equal_arguments(tmp_path: Path, prefill: dict[str, Any]) -> None:
    assert load(tmp_path, {}, engine=tensorrt_llm(prefill, NO_OVERLAP)).flexible


@pytest.mark.parametrize(
    ("prefill", "decode", "sections", "message"),
    [
        ({}, {}, {}, r"decode\.disable_overlap_scheduler: None; allowed .*: true"),
        (
            {"disable_overlap_scheduler": False},
            NO_OVERLAP,
            {},
            r"prefill\.disable_overlap_scheduler: False; allowed .*: true",
        ),
        (
            {"max_seq_len": 4096},
            NO_OVERLAP,
            {},
            r"prefill\.max_seq_len and \.decode\.max_seq_len: 4096 and None; .* equal",
        ),
        (
            {},
            {**NO_OVERLAP, "kv_cache_config": {"free_gpu_memory_fraction": 0.5}},
            {},
            r"kv_cache_config: None and {'free_gpu_memory_fraction': 0.5}; .* equal",
        ),
        (
            {},
            {**NO_OVERLAP, "pipeline_parallel_size": 2},
            {},
            r"pipeline_parallel_size: None and 2",
        ),
        (
            {},
            NO_OVERLAP,
            {"prefill": {"tensor_parallel": 2}},
            r"prefill\.tensor_parallel and decode\.tensor_parallel: 2 and 1",
        ),
    ],
)
def test_tensorrt_llm_with_other_arguments(
    tmp_path: Path,
    prefill: dict[str, Any],
    decode: dict[str, Any],
    sections: dict[str, Any],
    message: str,
) -> None:
    engine = tensorrt_llm(prefill, decode)
    load(tmp_path, {"flexible": []}, engine=engine, **sections)
    with pytest.raises(DeploymentError, match=message):
        load(tmp_path, {}, engine=engine, **sections)
