"""Tests for the fake of the `tensorrtllm` backend, behind the real Triton server."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tritonclient import grpc

from pdserve.config import Server as Spec
from pdserve.engines.emulated import EmulatedModel
from tests.clients import wait_until
from tests.fakes.repository import with_backend
from tests.servers import Running, default_deployment, running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

PROMPT = np.arange(3, 80, dtype=np.int32)
TOKENS = 8


@dataclass
class Backend:
    """A client of its two models."""

    running: Running
    model: EmulatedModel

    def expected(self, tokens: int = TOKENS) -> list[int]:
        return [self.model.token(PROMPT, i) for i in range(tokens)]

    def ask(self, model: str, kind: str | None, id_: str = "", **tensors: Any) -> Call:
        """Send a request in the example's form; `tensors` may leave out inputs and add some."""
        given = {
            "input_ids": PROMPT[None],
            "input_lengths": np.array([[len(PROMPT)]], np.int32),
            "request_output_len": np.array([[TOKENS]], np.int32),
            "streaming": np.array([[True]]),
            **tensors,
        }
        inputs = []
        for name, array in given.items():
            if array is None:
                continue
            names = {"bool": "BOOL", "int32": "INT32", "uint8": "UINT8", "float32": "FP32"}
            tensor = grpc.InferInput(name, array.shape, names.get(array.dtype.name, "UINT64"))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        parameters = None if kind is None else {"request_type": kind}
        return Call(self.running.grpc, model, inputs, parameters, id_)

    def held(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{self.running.servers[0].token}-trtllm-*"))


class Call:
    """A stream with one request on it."""

    def __init__(
        self, url: str, model: str, inputs: Any, parameters: dict[str, Any] | None, id_: str
    ) -> None:
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client = grpc.InferenceServerClient(url)
        self.client.start_stream(lambda result, error: self._answers.put((result, error)))
        self.client.async_stream_infer(
            model, inputs, request_id=id_, parameters=parameters, enable_empty_final_response=True
        )

    def next(self, timeout: float = 10) -> tuple[dict[str, Any], bool]:
        """Return the tensors of a response, and whether it is the last."""
        result, error = self._answers.get(timeout=timeout)
        if error is not None:
            self.client.stop_stream(cancel_requests=True)
            raise error
        response = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in response.outputs}
        return tensors, response.parameters["triton_final_response"].bool_param

    def all(self) -> list[dict[str, Any]]:
        """Return every response that has tensors."""
        found, last = [], False
        while not last:
            tensors, last = self.next()
            if tensors:
                found.append(tensors)
        self.client.stop_stream()
        return found


def ids(responses: list[dict[str, Any]]) -> list[int]:
    for each in responses:
        assert each["output_ids"].shape == (1, 1, each["sequence_length"][0, 0])
    return [id_ for each in responses for id_ in each["output_ids"][0, 0].tolist()]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("backend")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 997, "eos_token_id": 2}))
    (folder / "profile.yaml").write_text("decode: {base_ms: 2}\n")
    deployment = msgspec.structs.replace(
        default_deployment("emulated"),
        servers=(Spec(name="local", gateway=False, prefill=("context",), decode=("generation",)),),
    )
    source = with_backend(folder, engine_dir=str(folder))
    with running(deployment, folder, source) as server:
        yield Backend(server, EmulatedModel(str(folder), str(folder / "profile.yaml")))


def context(backend: Backend, **tensors: Any) -> dict[str, Any]:
    """Return the only response to a context request."""
    (response,) = backend.ask("context", "context_only", **tensors).all()
    return response


def test_the_link_of_the_example(backend: Backend) -> None:
    response = context(backend)
    assert ids([response]) == backend.expected()[:1]
    params = response["context_phase_params"]
    assert (params.dtype, params.shape[0], params.ndim) == (np.uint8, 1, 2)
    responses = backend.ask("generation", "generation_only", context_phase_params=params).all()
    assert ids(responses) == backend.expected(), "it begins with the context's first token"
    assert len(responses) > 2
    assert all("context_phase_params" not in each for each in responses)
    # The context frees it when it is told that all of it has been read.
    wait_until(lambda: not backend.held(), 2)


def test_what_is_not_streamed_comes_whole(backend: Backend) -> None:
    params = context(backend)["context_phase_params"]
    off = np.array([[False]])
    asked = {"context_phase_params": params, "streaming": off}
    (response,) = backend.ask("generation", "generation_only", **asked).all()
    assert ids([response]) == backend.expected()
    asked = {"streaming": off, "exclude_input_in_output": off}
    (response,) = backend.ask("generation", None, **asked).all()
    assert ids([response]) == [*PROMPT.tolist(), *backend.expected()]


def test_an_unknown_type_is_logged_and_no_more(backend: Backend) -> None:
    assert ids(backend.ask("context", "prefill_only").all()) == backend.expected()
    wait_until(lambda: "prefill_only" in backend.running.servers[0].read_log(), 2)


def test_an_invalid_link(backend: Backend) -> None:
    params = context(backend)["context_phase_params"]
    for wrong, message in (
        (None, "context_phase_params is missing"),
        (np.array([[255, 255]], np.uint8), "cannot be read"),
    ):
        with pytest.raises(Exception, match=message):
            backend.ask("generation", "generation_only", context_phase_params=wrong).all()
    backend.ask("generation", "generation_only", context_phase_params=params).all()
    with pytest.raises(Exception, match="not held"):
        backend.ask("generation", "generation_only", context_phase_params=params).all()


def test_the_ends_of_an_answer(backend: Backend) -> None:
    expected = backend.expected()
    end = np.array([[expected[3]]], np.int32)
    assert ids(backend.ask("context", None, end_id=end).all()) == expected[:3]
    word = np.array([[expected[4:6], [2, -1]]], np.int32)
    assert ids(backend.ask("context", None, stop_words_list=word).all()) == expected[:6]
    first = context(backend, end_id=np.array([[expected[0]]], np.int32))
    assert ids([first]) == [], "the end token is no output"
    assert first["context_phase_params"].size


def test_the_length_of_a_context_is_the_callers_affair(backend: Backend) -> None:
    """It answers one token whatever is asked for, and keeps room for what is asked for."""
    long = np.array([[6000]], np.int32)
    response = context(backend, request_output_len=long)
    second = backend.ask("context", "context_only", request_output_len=long)
    with pytest.raises(queue.Empty):
        second.next(timeout=0.2)
    params = response["context_phase_params"]
    backend.ask("generation", "generation_only", context_phase_params=params).all()
    (after,) = second.all()
    params = after["context_phase_params"]
    backend.ask("generation", "generation_only", context_phase_params=params).all()


def test_a_client_that_goes(backend: Backend) -> None:
    long = np.array([[4000]], np.int32)
    call = backend.ask("generation", None, request_output_len=long)
    call.next()
    call.client.stop_stream(cancel_requests=True)
    other = backend.ask("generation", None, id_="long", request_output_len=long)
    other.next()
    began = time.monotonic()
    backend.ask("generation", None, id_="long", stop=np.array([[True]])).all()
    assert len(ids(other.all())) < 1000
    assert time.monotonic() - began < 2
    # Both have freed their blocks: there is room for the longest possible answer.
    whole = np.array([[8192 - len(PROMPT)]], np.int32)
    third = backend.ask("generation", None, request_output_len=whole)
    third.next()
    third.client.stop_stream(cancel_requests=True)
