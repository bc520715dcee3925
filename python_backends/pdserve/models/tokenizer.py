"""Triton model ``tokenizer``: text or a conversation in, token ids out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.models import stub, triton
from pdserve.parameters import scalar
from pdserve.tokenizer import Tokenizer, parse_prompt


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        self._tokenizer = Tokenizer(Path(triton.deployment(args).model))
        self._heartbeat = triton.own_heartbeat(args, threads=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [triton.answered(request, self._answer, self._heartbeat) for request in requests]

    def finalize(self) -> None:
        self._heartbeat.close()

    def _answer(self, request: Any) -> Any:
        inputs = triton.tensors(request)
        prompt = parse_prompt(scalar(inputs, "text_input"), bool(scalar(inputs, "chat")))
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        else:
            ids = self._tokenizer.encode_chat(prompt)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids[np.newaxis])])
