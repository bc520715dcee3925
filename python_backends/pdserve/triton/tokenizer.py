"""Triton model ``tokenizer``: converts text or a conversation to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.gateway.parameters import scalar
from pdserve.text.tokenizer import Tokenizer, parse_prompt
from pdserve.triton import backend, prompts, stub


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
        data = prompts.text(inputs, self._most)
        ids = self._tokenizer.encode_prompt(parse_prompt(data, bool(scalar(inputs, "chat"))))
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids[np.newaxis])])
