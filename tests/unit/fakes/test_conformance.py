"""Tests that the fake of TensorRT-LLM has the library's signatures, where that is installed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

from tests.fakes.importing import tensorrt_llm

CONFIGS = ("CacheTransceiverConfig", "KvCacheConfig", "TorchLlmArgs")
VERSIONS = {(1, 0): "1.0.0", (1, 1): "1.0.0", (1, 2): "1.2.1", (1, 3): "1.3.0rc29"}


@pytest.fixture(scope="module")
def real() -> ModuleType:
    try:
        module = importlib.import_module("tensorrt_llm")
    except ImportError as error:
        pytest.skip(f"TensorRT-LLM is not installed: {error}")
    if getattr(module, "IS_FAKE", False):
        pytest.skip("the tensorrt_llm that is importable is the fake")
    return module


@pytest.fixture(scope="module")
def signatures(real: ModuleType) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the signatures of the library, and of the fake in the nearest version."""
    ours = _signatures(real)
    major, minor, *_ = real.__version__.split(".")
    with tensorrt_llm(VERSIONS.get((int(major), int(minor)), "1.4.0rc1")) as fake:
        return ours, _signatures(fake)


def _signatures(module: ModuleType) -> dict[str, Any]:
    api = importlib.import_module("tensorrt_llm.llmapi")
    return {
        "DisaggregatedParams": {
            field.name: field.default for field in dataclasses.fields(module.DisaggregatedParams)
        },
        "SamplingParams": {
            field.name: field.default
            for field in dataclasses.fields(module.SamplingParams)
            if field.init and not field.name.startswith("_")
        },
        **{name: _parameters(getattr(api, name)) for name in CONFIGS},
        "generate_async": _parameters(module.LLM.generate_async),
        "CompletionOutput": dict.fromkeys(
            field.name for field in dataclasses.fields(api.CompletionOutput)
        ),
        "RequestOutput": dict.fromkeys(
            name for name in dir(api.RequestOutput) if not name.startswith("_")
        ),
    }


def _parameters(function: Any) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "CacheTransceiverConfig",
        "CompletionOutput",
        "KvCacheConfig",
        "SamplingParams",
        "TorchLlmArgs",
    ],
)
def test_the_fake_has_nothing_that_the_library_has_not(
    signatures: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    real, fake = (each[name] for each in signatures)
    invented = {field for field in fake.keys() - real.keys() if not field.startswith("_")}
    assert not invented


@pytest.mark.parametrize("name", ["DisaggregatedParams", "generate_async"])
def test_what_travels_is_the_same(
    signatures: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    real, fake = (each[name] for each in signatures)
    assert fake == real


def test_the_parameters_come_in_the_same_order(
    signatures: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    real, fake = (list(each["generate_async"]) for each in signatures)
    assert fake == real


def test_defaults_of_the_transceiver(
    signatures: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    real, fake = (each["CacheTransceiverConfig"] for each in signatures)
    assert fake == {name: real[name] for name in fake}
