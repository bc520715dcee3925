"""Triton model ``detokenizer``: converts token ids, of an answer or a part of one, to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import needed, scalar
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
        inputs = backend.tensors(request)
        ids = needed(inputs, "output_ids").reshape(-1)
        part = "text_span" in inputs
        # A model may have more ids than its vocabulary; they have no text, as in pdserve.
        most = np.iinfo(np.int32).max if part else self._vocabulary.size - 1
        wrong = ids[(ids < 0) | (ids > most)]
        if wrong.size:
            raise InvalidRequest(f"output_ids: {wrong[0]}; allowed: 0 to {most}")
        text = self._vocabulary.decode(ids.tolist())
        if not part:
            return pb_utils.InferenceResponse([backend.text("text_output", text)])
        start, end = _span(inputs["text_span"].reshape(-1).tolist(), len(text))
        data = (scalar(inputs, "text_before") or b"") + text[start:end].encode()
        # Without a batch dimension, as pdserve sends the parts of an answer.
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("text_output", np.array([data], object))]
        )


def _span(given: list[int], characters: int) -> tuple[int, int]:
    """Return start and end. Raises InvalidRequest: they are no part of so many characters."""
    start, end = given
    if not 0 <= start <= end <= characters:
        raise InvalidRequest(
            f"text_span: {start}, {end}; allowed: start and end within {characters} characters"
        )
    return start, end
