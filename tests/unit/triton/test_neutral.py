"""Tests for TensorRT-LLM's input fields: neutral values pass, any other is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.errors import InvalidRequest
from pdserve.triton.neutral import NEUTRAL, check

REPOSITORY = Path(__file__).parents[3] / "model_repository"
END = (2, 7)
SIZE = 100


def checked(**fields: Any) -> None:
    check({name: np.array([value]) for name, value in fields.items()}, END, SIZE)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_pass(name: str) -> None:
    (neutral,) = NEUTRAL[name]
    array = np.array([[neutral]], object if isinstance(neutral, bytes) else None)
    check({name: array}, END, SIZE)
    check({name: array[:, :0]}, END, SIZE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beam_width", [2], "beam_width: 2; allowed: 1"),
        ("beam_width", [0], "beam_width: 0; allowed: 1"),
        ("num_return_sequences", [4], "num_return_sequences: 4; allowed: 1"),
        ("min_length", [5], "min_length: 5; allowed: 0"),
        ("length_penalty", [0.5], "length_penalty: 0.5; allowed: 1"),
        ("length_penalty", [float("nan")], "length_penalty: nan; allowed: 1"),
        ("return_log_probs", [True], "return_log_probs: true; allowed: false"),
        ("bad_words", [b"", b"no"], "bad_words: 'no'; allowed: none"),
        ("bad_words", [b"\xff"], "bad_words: '\ufffd'; allowed: none"),
        ("embedding_bias_weights", [0.0, 1.5], "embedding_bias_weights: 1.5; allowed: 0"),
        ("lora_task_id", [3], "lora_task_id: 3; allowed: 0"),
        ("end_id", [3], "end_id: 3; allowed: what ends this model's text: 2, 7"),
        ("end_id", [-1], "end_id: -1; allowed: what ends this model's text: 2, 7"),
        ("pad_id", [-1], "pad_id: -1; allowed: 0 to 99"),
        ("pad_id", [100], "pad_id: 100; allowed: 0 to 99"),
    ],
)
def test_any_other_is_refused_by_name(name: str, value: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(**{name: np.array(value, object if isinstance(value[0], bytes) else None)})
    assert str(caught.value) == message
    str(caught.value).encode()


def test_a_long_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(bad_words=np.array([b"x" * 100_000], object))
    assert len(str(caught.value)) < 200


def test_tokens_of_the_model() -> None:
    checked(end_id=[7], pad_id=[99])
    checked(end_id=[2], pad_id=[0])


def test_accumulated_tokens_are_those_of_one_response() -> None:
    checked(accumulate_tokens=[False], stream=[True])
    checked(accumulate_tokens=[True], stream=[False])
    checked(accumulate_tokens=[True])
    with pytest.raises(InvalidRequest, match="accumulate_tokens: true; allowed: false"):
        checked(accumulate_tokens=[True], stream=[True])


@pytest.mark.parametrize("model", ["pdserve", "scheduler"])
def test_triton_is_told_of_each(model: str) -> None:
    declared = re.findall(r'name: "(\w+)" data_type: TYPE_(\w+)', _config(model))
    kinds = {bytes: "STRING", bool: "BOOL", float: "FP32"}
    text_only = {"decoder_text_input", "image_url_input"} if model == "scheduler" else set()
    for name, (neutral,) in NEUTRAL.items():
        if name in text_only:
            continue
        kind = dict(declared)[name]
        assert kind == kinds.get(type(neutral), kind)
        assert isinstance(neutral, (bytes, bool, float)) or kind in ("INT32", "UINT64")


def _config(model: str) -> str:
    return (REPOSITORY / model / "config.pbtxt").read_text()
