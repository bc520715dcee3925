"""Tests for the configuration of the ensemble, beside those of its steps and of pdserve."""

from __future__ import annotations

import re
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from pdctl.paths import MODEL_REPOSITORY

STEPS = ("tokenizer", "scheduler", "detokenizer")


def config(model: str) -> Any:
    text = (MODEL_REPOSITORY / model / "config.pbtxt").read_text()
    return text_format.Parse(text, ModelConfig())


@pytest.fixture
def ensemble() -> Any:
    return config("ensemble")


def tensors(entries: Any) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(entry.name, entry.data_type, tuple(entry.dims)) for entry in entries]


def test_its_tensors_are_those_of_pdserve(ensemble: Any) -> None:
    pdserve = config("pdserve")
    assert tensors(ensemble.input) == tensors(pdserve.input)
    assert tensors(ensemble.output) == tensors(pdserve.output)
    assert ensemble.max_batch_size == pdserve.max_batch_size
    assert all(entry.optional for entry in ensemble.input)


def test_every_step_gets_all_of_its_inputs(ensemble: Any) -> None:
    """Triton would leave out an optional one that is not mapped, and say nothing."""
    steps = ensemble.ensemble_scheduling.step
    assert tuple(step.model_name for step in steps) == STEPS
    for step in steps:
        inputs = config(step.model_name).input
        assert set(step.input_map) == {entry.name for entry in inputs}
    given = {name for step in steps for name in step.input_map.values()}
    assert {entry.name for entry in ensemble.input} <= given


def test_what_the_last_step_gets_comes_from_the_scheduler(ensemble: Any) -> None:
    """Triton refuses a step with inputs from before and after a decoupled one."""
    _, scheduler, detokenizer = ensemble.ensemble_scheduling.step
    assert set(detokenizer.input_map.values()) <= set(scheduler.output_map.values())


@pytest.mark.parametrize("model", STEPS)
def test_a_step_answers_in_the_order_it_is_asked(model: str) -> None:
    """Triton pairs the outputs of two steps by their order, which several instances would mix."""
    found = config(model)
    assert [group.count for group in found.instance_group] == [1]
    assert not found.HasField("dynamic_batching")


def test_the_scheduler_knows_the_text_s_inputs_as_pdserve_does() -> None:
    """So that the error of an unknown field is the same."""
    inputs = [name for name, *_ in tensors(config("scheduler").input) if name != "input_ids"]
    assert inputs == [name for name, *_ in tensors(config("pdserve").input)]


def test_no_comment_is_lost_in_a_name() -> None:
    """``pdctl`` renames a model by its one line ``name:``."""
    text = (MODEL_REPOSITORY / "ensemble" / "config.pbtxt").read_text()
    assert len(re.findall(r"^name:", text, re.MULTILINE)) == 1
