"""Legacy: tests of the tensors of the C++ backend."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pdctl.paths import ROOT
from pdserve import config
from pdserve.engines import build
from pdserve.engines.tensorrtllm_backend import tensors
from pdserve.sampling import Sampling
from tests.unit.engines.llm import deployment, new_request
from tests.unit.engines.test_tensorrt_llm_names import table

if TYPE_CHECKING:
    from pathlib import Path


def test_tensors_are_in_the_table() -> None:
    there = table()
    sampled = new_request(sampling=Sampling(0.5, 3, 0.5, 1, 1.1, 0.1, 0.1))
    given = {
        *tensors.request(new_request(), [2, 3], streaming=True, link=b"x"),
        *tensors.request(sampled, [2], streaming=False),
    }
    assert given == there["input tensor"]
    assert there["output tensor"] == {tensors.IDS, tensors.LENGTH, tensors.LINK}
    assert there["request parameter"] == {
        tensors.REQUEST_TYPE,
        tensors.CONTEXT,
        tensors.GENERATION,
    }


def test_shapes_of_the_tensors() -> None:
    """Each tensor has a batch dimension, and the type that the backend's configuration gives it."""
    request = new_request(sampling=Sampling(0.5, 3, 0.5, (1 << 64) - 1))
    given = tensors.request(request, [2, 3, 4], streaming=True, link=bytes(range(9)))
    assert all(tensor.shape[0] == 1 for tensor in given.values())
    assert given["input_ids"].shape == (1, 32)
    assert given["stop_words_list"].tolist() == [[[3, 4], [1, 2]]]
    assert given["seed"].dtype == np.uint64
    assert given["context_phase_params"].dtype == np.uint8
    assert given["streaming"].dtype == np.bool_
    for name in ("temperature", "runtime_top_p", "presence_penalty"):
        assert given[name].dtype == np.float32
    for name in ("input_ids", "input_lengths", "request_output_len", "end_id", "runtime_top_k"):
        assert given[name].dtype == np.int32
    endless = tensors.request(request._replace(ignore_eos=True), [2, 3], streaming=True)
    assert not {"end_id", "stop_words_list"} & set(endless)


def test_answers_are_read() -> None:
    ids = np.array([[[5, 6, 7, 0]]], np.int32)
    found = tensors.answer({"output_ids": ids, "sequence_length": np.array([[3]], np.int32)})
    assert found == ([5, 6, 7], b"")
    with pytest.raises(Exception, match="without output_ids or sequence_length"):
        tensors.answer({"sequence_length": np.array([[3]], np.int32)})


def test_its_deployment_can_be_read() -> None:
    read = config.load(ROOT / "deployments" / "tensorrtllm-backend.yaml")
    assert read.engine.kind == "tensorrtllm_backend"


def test_that_it_is_legacy_is_said_when_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = config.TritonModel("localhost:9001", "context")
    wanted = deployment(tmp_path, kind="tensorrtllm_backend", models={"prefill_0": place})
    with caplog.at_level(logging.WARNING):
        build.external("prefill_0", "prefill", wanted)
    assert "images later than 26.07 have no such backend" in caplog.text
    assert "Tenants share cached prefixes" in caplog.text
