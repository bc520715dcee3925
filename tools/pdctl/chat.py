"""Ask the model ``pdserve`` of a running server, over a gRPC stream."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from pdctl.errors import ServerError
from pdserve.connections import GRPC_OPTIONS

ANSWER_TIMEOUT_S = 300.0
"""The longest wait for the next response, in seconds."""


@dataclass
class Question:
    """A question to the model; None leaves a value to the server."""

    text: str
    chat: bool = True
    system: str | None = None
    options: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Further inputs by name: Triton data type and value."""

    def inputs(self) -> list[grpc.InferInput]:
        text = self.text
        if self.system is not None:
            turns = [("system", self.system), ("user", text)]
            text = json.dumps([{"role": role, "content": content} for role, content in turns])
        values = {
            "text_input": ("BYTES", text.encode()),
            "chat": ("BOOL", self.chat),
            "stream": ("BOOL", True),
            **self.options,
        }
        return [_tensor(name, *value) for name, value in values.items() if value[1] is not None]


@dataclass(frozen=True)
class Part:
    """One response: new text; the last one also has the finish reason and the stats."""

    text: str
    finish_reason: str
    stats: dict[str, Any] | None


def ask(url: str, question: Question) -> Iterator[Part]:
    """Yield the answer as it comes. Closing the iterator cancels the request.

    Args:
        url: host:port of the server's gRPC.

    Raises:
        ServerError: refused, failed, or the server is gone; with the server's message.
    """
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    client = grpc.InferenceServerClient(url, channel_args=GRPC_OPTIONS)
    try:
        client.start_stream(lambda result, error: answers.put((result, error)))
        # If the stream has broken already, this raises, and the callback gets the reason.
        with suppress(InferenceServerException):
            client.async_stream_infer(
                "pdserve", question.inputs(), enable_empty_final_response=True
            )
        final = False
        while not final:
            try:
                result, error = answers.get(timeout=ANSWER_TIMEOUT_S)
            except queue.Empty:
                raise ServerError(f"{url}: no answer for {ANSWER_TIMEOUT_S:.0f} s") from None
            if error is not None:
                raise ServerError(f"{url}: {error}")
            parameters = result.get_response().parameters
            final = parameters["triton_final_response"].bool_param
            if result.as_numpy("text_output") is not None:
                stats = _text(result, "stats")
                yield Part(
                    _text(result, "text_output"),
                    _text(result, "finish_reason"),
                    json.loads(stats) if stats else None,
                )
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def _tensor(name: str, kind: str, value: Any) -> grpc.InferInput:
    dtypes = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32}
    tensor = grpc.InferInput(name, [1, 1], kind)
    tensor.set_data_from_numpy(np.array([[value]], dtype=dtypes.get(kind, np.uint64)))
    return tensor


def _text(result: grpc.InferResult, name: str) -> str:
    values = result.as_numpy(name)
    return "" if values is None else values.reshape(-1)[0].decode()
