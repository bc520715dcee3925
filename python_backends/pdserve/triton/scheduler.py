"""Triton model ``scheduler``: takes token ids and returns token ids.

It is also the middle step of ``ensemble``, which gives it the text of the prompt beside the ids.
Then a response is sent when it has text, and carries what the detokenizer needs for it. Only this
step can end an answer at a stop string, so it is the one that finds where each text ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.config.names import ENSEMBLE
from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import Tensors, scalar
from pdserve.gateway.service import Part, Prompt
from pdserve.text import vocabulary
from pdserve.text.tokenizer import beginning, parse_prompt
from pdserve.text.vocabulary import Vocabulary
from pdserve.triton import prompts
from pdserve.triton.gateway import GatewayModel

OF_TEXT = ("text_input", "chat", "exclude_input_in_output")
"""Inputs that ``ensemble`` gives beside ``input_ids``, which its own clients do not know."""


class TritonPythonModel(GatewayModel):
    prompt_input = "input_ids"

    def read(self, model: Path) -> Vocabulary:
        return vocabulary.read(model)

    def allowed(self, inputs: Tensors) -> list[str]:
        other = ("input_ids",) if "text_input" in inputs else OF_TEXT
        return [name for name in super().allowed(inputs) if name not in other]

    async def prompt(self, inputs: Tensors) -> Prompt:
        ids = inputs[self.prompt_input].reshape(-1)
        in_text = "text_input" in inputs
        if not ids.size:
            empty = "input_ids: empty; at least 1 token is needed"
            raise InvalidRequest(prompts.NO_TOKENS if in_text else empty)
        size = self.vocabulary.size
        wrong = ids[(ids < 0) | (ids >= size)]
        if wrong.size:
            raise InvalidRequest(f"input_ids: {wrong[0]}; allowed: 0 to {size - 1}")
        if in_text:
            data = prompts.text(inputs, self.deployment.gateway.max_prompt_bytes)
            begins = beginning(parse_prompt(data, bool(scalar(inputs, "chat"))))
            return Prompt(ids, prompts.echo(inputs), begins, in_text=True, model=ENSEMBLE)
        for name in OF_TEXT:
            if name in inputs:
                raise InvalidRequest(f"{name} is allowed only together with text_input")
        return Prompt(ids)

    def outputs(self, part: Part) -> list[Any]:
        ids = pb_utils.Tensor("output_ids", np.array([part.ids], np.int32))
        excerpt = part.excerpt
        if excerpt is None:
            return [ids]
        return [
            ids,
            pb_utils.Tensor("text_before", np.array([[excerpt.before.encode()]], object)),
            pb_utils.Tensor("text_ids", np.array([excerpt.ids], np.int32)),
            pb_utils.Tensor("text_span", np.array([[excerpt.start, excerpt.end]], np.int32)),
        ]
