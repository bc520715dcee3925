"""Tests with clients written for TensorRT-LLM's Triton models: what they send and read.

Tensors, data types, shapes, order of calls and reading of responses are those of

- ``end_to_end_grpc_client.py`` (TensorRT-LLM, ``triton_backend/inflight_batcher_llm/client``),
- LlamaIndex's connector (``llama-index-llms-nvidia-triton``, ``utils.py``),
- LangChain's (``langchain-nvidia-trt``, ``llms.py``), with INT32 for its UINT32, which no model
  takes together with INT32,
- the README of ``tensorrtllm_backend``, over HTTP.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from typing import Any

import google.protobuf.json_format
import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.grpc.service_pb2 import ModelInferResponse
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.clients import Refused, generate, post
from tests.servers import Running

pytestmark = pytest.mark.triton

END_ID = 2
"""The end-of-text id of the served model."""
WITHIN_S = 30
MODELS = ("pdserve", "ensemble")
"""The second is the name that these clients have by default."""


def prepare_tensor(name: str, data: np.ndarray[Any, Any]) -> grpc.InferInput:
    made = grpc.InferInput(name, data.shape, np_to_triton_dtype(data.dtype))
    made.set_data_from_numpy(data)
    return made


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def streamed(
    server: Running, model: str, inputs: list[grpc.InferInput], request_id: str = "1"
) -> Iterator[grpc.InferResult]:
    """Yield every result of one request, up to the final flag. Raises: InferenceServerException."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = grpc.InferenceServerClient(server.grpc)
    assert client.is_model_ready(model)
    client.start_stream(callback=lambda result, error: arrived.put((result, error)))
    outputs = [grpc.InferRequestedOutput("text_output")]
    client.async_stream_infer(model, inputs, outputs=outputs, request_id=request_id)
    try:
        while True:
            result, error = arrived.get(timeout=WITHIN_S)
            if error:
                raise error
            yield result
            raw = result.get_response(as_json=True)
            if raw["parameters"]["triton_final_response"]["bool_param"]:
                return
    finally:
        client.stop_stream()
        client.close()


class TestEndToEndClient:
    def inputs(self, *, streaming: bool, **more: Any) -> list[grpc.InferInput]:
        prompt = [["The sea is"]]
        given = {
            "text_input": np.array(prompt).astype(object),
            "max_tokens": np.ones_like(prompt).astype(np.int32) * 12,
            "stream": np.array([[streaming]], dtype=bool),
            "beam_width": np.array([[1]], dtype=np.int32),
            "temperature": np.array([[1.0]], dtype=np.float32),
            "num_return_sequences": np.array([[1]], dtype=np.int32),
            "stop_words": np.array([[""]], dtype=object),
            "bad_words": np.array([[""]], dtype=object),
            "repetition_penalty": np.array([[1.0]], dtype=np.float32),
            "presence_penalty": np.array([[0.0]], dtype=np.float32),
            "frequency_penalty": np.array([[0.0]], dtype=np.float32),
            "end_id": np.array([[END_ID]], dtype=np.int32),
            "pad_id": np.array([[END_ID]], dtype=np.int32),
            "exclude_input_in_output": np.array([[True]], dtype=bool),
            "return_log_probs": np.array([[False]], dtype=bool),
            "return_context_logits": np.array([[False]], dtype=bool),
            "return_generation_logits": np.array([[False]], dtype=bool),
            "use_draft_logits": np.array([[False]], dtype=bool),
            **more,
        }
        return [prepare_tensor(name, value) for name, value in given.items()]

    @pytest.mark.parametrize("streaming", [True, False])
    def test_it_reads_its_answer(
        self, emulated_server: Running, model: str, streaming: bool
    ) -> None:
        text = ""
        for result in streamed(emulated_server, model, self.inputs(streaming=streaming)):
            output = result.as_numpy("text_output")
            if output is not None:
                text += output[0].decode("utf-8")
        plain = generate(emulated_server, text_input="The sea is", max_tokens=12, temperature=1.0)
        assert text
        assert plain.stats["output_tokens"] == 12

    def test_the_seed_of_either_name_is_the_same(
        self, emulated_server: Running, model: str
    ) -> None:
        seed = {"random_seed": np.array([[7]], dtype=np.uint64)}
        results = streamed(emulated_server, model, self.inputs(streaming=False, **seed))
        text = "".join(result.as_numpy("text_output")[0].decode() for result in results)
        plain = generate(
            emulated_server, text_input="The sea is", max_tokens=12, temperature=1.0, seed=7
        )
        assert text == plain.text

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("beam_width", np.array([[2]], np.int32)),
            ("num_return_sequences", np.array([[2]], np.int32)),
            ("end_id", np.array([[11]], np.int32)),
            ("bad_words", np.array([["no"]], object)),
            ("return_log_probs", np.array([[True]])),
            ("lora_task_id", np.array([[1]], np.uint64)),
            ("guided_decoding_guide_type", np.array([["json"]], object)),
        ],
    )
    def test_what_is_not_there_is_refused_by_name(
        self, emulated_server: Running, model: str, name: str, value: np.ndarray[Any, Any]
    ) -> None:
        with pytest.raises(InferenceServerException, match=f"INVALID_ARG: {name}: .*; allowed: "):
            list(streamed(emulated_server, model, self.inputs(streaming=True, **{name: value})))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("connector", ["llama_index", "langchain"])
def test_connectors(emulated_server: Running, model: str, connector: str, stream: bool) -> None:
    """Both connectors make the same inputs, and read each response from its JSON."""
    given = {
        "text_input": np.array([["The sea is"]]).astype(object),
        "max_tokens": np.array([12]).astype(np.int32).reshape((1, -1)),
        "top_k": np.array([1]).astype(np.int32).reshape((1, -1)),
        "top_p": np.array([0]).astype(np.float32).reshape((1, -1)),
        "temperature": np.array([1.0]).astype(np.float32).reshape((1, -1)),
        "length_penalty": np.array([1.0]).astype(np.float32).reshape((1, -1)),
        "repetition_penalty": np.array([1.0]).astype(np.float32).reshape((1, -1)),
        "random_seed": np.array([0 if connector == "llama_index" else 42])
        .astype(np.uint64)
        .reshape((1, -1)),
        "beam_width": np.array([1]).astype(np.int32).reshape((1, -1)),
        "stream": np.array([[stream]], dtype=bool),
    }
    text = ""
    for result in streamed(emulated_server, model, [prepare_tensor(*one) for one in given.items()]):
        raw = result.get_response(as_json=True)
        if "outputs" in raw:
            message = ModelInferResponse()
            google.protobuf.json_format.Parse(json.dumps(raw), message)
            read = grpc.InferResult(message).as_numpy("text_output")
            text += "".join([token.decode() for token in read])
    plain = generate(emulated_server, text_input="The sea is", max_tokens=12)
    assert text == plain.text, "top_k 1 is greedy"


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": "", "stop_words": ""},
        {"bad_words": "", "stop_words": "", "pad_id": END_ID, "end_id": END_ID},
        {"bad_words": [], "stop_words": [], "accumulate_tokens": True, "min_length": 0},
        {"bad_words": [""], "random_seed": 0, "top_p": 0.0, "top_k": 0, "length_penalty": 1.0},
        {"return_log_probs": False, "return_context_logits": False, "beam_width": 1},
        {"decoder_text_input": "", "embedding_bias_words": [], "embedding_bias_weights": []},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("model", [*MODELS, "scheduler"])
def test_over_http(emulated_server: Running, model: str, fields: dict[str, Any]) -> None:
    prompt: dict[str, Any] = {"text_input": "What is machine learning?"}
    if model == "scheduler":
        prompt = {"input_ids": [5, 6, 7]}
        fields = {name: value for name, value in fields.items() if name != "decoder_text_input"}
    plain = generate(emulated_server, model, max_tokens=20, **prompt)
    with_fields = generate(emulated_server, model, max_tokens=20, **prompt, **fields)
    assert (with_fields.text, with_fields.ids) == (plain.text, plain.ids)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seed": 1, "random_seed": 2}, "random_seed: 2; allowed: what seed says, 1, or none"),
        ({"min_length": 3}, "min_length: 3; allowed: 0"),
        (
            {"accumulate_tokens": True, "stream": True},
            "accumulate_tokens: true; allowed: false, or true without stream",
        ),
        ({"bad_words": ["", "no"]}, "bad_words: 'no'; allowed: none"),
        ({"pad_id": -1}, "pad_id: -1; allowed: 0 to 49151"),
        ({"end_id": -1}, f"end_id: -1; allowed: what ends this model's text: {END_ID}"),
    ],
)
def test_over_http_anything_else_is_refused_by_name(
    emulated_server: Running, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refused) as refused:
        generate(emulated_server, text_input="a", **fields)
    assert str(refused.value) == f"INVALID_ARG: {says}"


def test_a_field_that_is_none_is_told_apart(emulated_server: Running) -> None:
    body = {"text_input": "a", "max_tokens": 1, "beam_widht": 1}
    status, answer = post(emulated_server, "/v2/models/pdserve/generate", body)
    assert status == 400
    assert "unknown field 'beam_widht'" in answer["error"]
