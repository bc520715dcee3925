"""Triton model ``scheduler``: takes token ids and returns token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import Tensors
from pdserve.gateway.service import Prompt
from pdserve.text import vocabulary
from pdserve.text.vocabulary import Vocabulary
from pdserve.triton.gateway import GatewayModel


class TritonPythonModel(GatewayModel):
    prompt_input = "input_ids"
    answers_in_text = False

    def read(self, model: Path) -> Vocabulary:
        return vocabulary.read(model)

    async def prompt(self, inputs: Tensors) -> Prompt:
        ids = inputs[self.prompt_input].reshape(-1)
        if not ids.size:
            raise InvalidRequest("input_ids: empty; at least 1 token is needed")
        size = self.vocabulary.size
        wrong = ids[(ids < 0) | (ids >= size)]
        if wrong.size:
            raise InvalidRequest(f"input_ids: {wrong[0]}; allowed: 0 to {size - 1}")
        return Prompt(ids)

    def outputs(self, text: str, ids: list[int]) -> list[Any]:
        return [pb_utils.Tensor("output_ids", np.array([ids], np.int32))]
