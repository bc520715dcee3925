"""Triton model ``detokenizer``: converts the token ids of a whole answer to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from pdserve import errors
from pdserve.text import vocabulary
from pdserve.triton import backend, stub


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        self._vocabulary = vocabulary.read(Path(backend.deployment(args).model))
        self._heartbeat = backend.own_heartbeat(args, threads=1)
        self._heartbeat.loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [backend.answered(request, self._answer, self._heartbeat) for request in requests]

    def finalize(self) -> None:
        self._heartbeat.close()

    def _answer(self, request: Any) -> Any:
        ids = backend.tensors(request)["output_ids"].reshape(-1)
        size = self._vocabulary.size
        wrong = ids[(ids < 0) | (ids >= size)]
        if wrong.size:
            raise errors.InvalidRequest(f"output_ids: {wrong[0]}; allowed: 0 to {size - 1}")
        text = self._vocabulary.decode(ids.tolist())
        return pb_utils.InferenceResponse([backend.text("text_output", text)])
