"""Triton model ``tokenizer``: converts text or a conversation to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import scalar
from pdserve.text.tokenizer import Tokenizer, parse_prompt
from pdserve.triton import backend, stub


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        deployment = backend.deployment(args)
        self._tokenizer = Tokenizer(Path(deployment.model))
        self._most = deployment.gateway.max_prompt_bytes
        self._heartbeat = backend.own_heartbeat(args, threads=1)
        self._heartbeat.loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [backend.answered(request, self._answer, self._heartbeat) for request in requests]

    def finalize(self) -> None:
        self._heartbeat.close()

    def _answer(self, request: Any) -> Any:
        inputs = backend.tensors(request)
        data: bytes = scalar(inputs, "text_input")
        if len(data) > self._most:
            raise InvalidRequest(f"text_input: {len(data)} bytes; at most {self._most} are allowed")
        prompt = parse_prompt(data, bool(scalar(inputs, "chat")))
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        else:
            ids = self._tokenizer.encode_chat(prompt)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids[np.newaxis])])
