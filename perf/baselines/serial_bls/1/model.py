"""Baseline: one request at a time, by a blocking BLS call to a prefill, then one to a decode."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.control.assignment import FIRST
from pdserve.errors import InstanceError
from pdserve.gateway import parameters
from pdserve.rpc import messages
from pdserve.rpc.seal import Seal
from pdserve.sampling import Sampling
from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer
from pdserve.transfer import key
from pdserve.triton import backend

WHOLE_ANSWER_MS = 1e9


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        deployment = backend.deployment(args)
        self._tokenizer = Tokenizer(Path(deployment.model))
        self._prefill = next(iter(deployment.instances("prefill")))
        self._decode = next(iter(deployment.instances("decode")))
        self._ids = itertools.count()
        secret = key.of(deployment)
        self._seals = {name: Seal(secret, name) for name in (self._prefill, self._decode)}

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                response = self._answer(request, sender)
            except Exception as error:  # the client must get an answer
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(repr(error)))
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> Any:
        """Send all responses but the last, which is returned."""
        inputs = backend.tensors(request)
        asked = parameters.parse(inputs, {}, 0, inputs)
        text = parameters.scalar(inputs, "text_input").decode()
        prompt = self._tokenizer.encode(text).astype("<i4").tobytes()
        max_tokens = asked.max_tokens or parameters.DEFAULT_MAX_TOKENS
        name = f"serial-{next(self._ids)}"
        sampling = Sampling(**asked.sampling)
        prefill = messages.PrefillRequest(name, prompt, sampling, asked.tenant, 60_000.0)
        (result,) = self._call(self._prefill, prefill)
        if not isinstance(result, messages.Prefilled):
            raise InstanceError(f"{self._prefill}: {result}")
        decode = messages.DecodeRequest(
            id=name,
            prompt=prompt,
            first_token=result.token,
            handle=result.handle,
            sampling=sampling,
            salt=asked.tenant,
            max_tokens=max_tokens,
            ignore_eos=asked.ignore_eos,
            min_interval_ms=0.0 if asked.stream else WHOLE_ANSWER_MS,
        )
        stream, count, reason = TextStream(self._tokenizer), 1, ""
        piece = stream.push([result.token])
        for reply in self._call(self._decode, decode):
            if not isinstance(reply, messages.Tokens):
                raise InstanceError(f"{self._decode}: {reply}")
            ids = np.frombuffer(reply.ids, "<i4").tolist()
            count += len(ids)
            piece += stream.push(ids)
            reason = reply.finish_reason
            if asked.stream and not reason:
                outputs = [backend.text("text_output", piece), backend.text("finish_reason", "")]
                sender.send(pb_utils.InferenceResponse(outputs))
                piece = ""
        stats = {"prompt_tokens": len(prompt) // 4, "output_tokens": count}
        return pb_utils.InferenceResponse(
            [
                backend.text("text_output", piece + stream.finish()),
                backend.text("finish_reason", reason),
                backend.text("stats", json.dumps(stats)),
            ]
        )

    def _call(self, model: str, message: messages.Request) -> Iterator[messages.Reply]:
        data = np.frombuffer(self._seals[model].close(messages.encode(message), FIRST), np.uint8)
        request = pb_utils.InferenceRequest(
            model_name=model,
            request_id=message.id,
            requested_output_names=["reply"],
            inputs=[pb_utils.Tensor("request", data)],
        )
        for response in request.exec(decoupled=True):
            if response.has_error():
                raise InstanceError(f"{model}: {response.error().message()}")
            for tensor in response.output_tensors():
                for _, reply in messages.decode_replies(tensor.as_numpy().tobytes()).replies:
                    if not isinstance(reply, messages.Accepted):
                        yield reply
