"""Triton model ``pdserve``: takes text and returns text."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve.engines.protocol import Tokens
from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import Tensors, scalar
from pdserve.gateway.service import Part, Prompt
from pdserve.text.tokenizer import Tokenizer, beginning, parse_prompt
from pdserve.text.vocabulary import Vocabulary
from pdserve.triton import prompts
from pdserve.triton.gateway import GatewayModel

# Bytes above which a text is tokenized in another thread, so that other streams go on.
LONG_TEXT = 16 << 10


class TritonPythonModel(GatewayModel):
    prompt_input = "text_input"

    def read(self, model: Path) -> Vocabulary:
        self._tokenizer = Tokenizer(model)
        return self._tokenizer

    async def prompt(self, inputs: Tensors) -> Prompt:
        data = prompts.text(inputs, self.deployment.gateway.max_prompt_bytes)
        chat = bool(scalar(inputs, "chat"))
        if len(data) > LONG_TEXT:
            loop = asyncio.get_running_loop()
            ids, begins = await loop.run_in_executor(None, self._encode, data, chat)
        else:
            ids, begins = self._encode(data, chat)
        if not ids.size:
            raise InvalidRequest(prompts.NO_TOKENS)
        return Prompt(ids, prompts.echo(inputs), begins, in_text=True)

    def _encode(self, data: bytes, chat: bool) -> tuple[Tokens, str]:
        """Return the token ids, and the text that rules match."""
        prompt = parse_prompt(data, chat)
        return self._tokenizer.encode_prompt(prompt), beginning(prompt)

    def outputs(self, part: Part) -> list[Any]:
        # Without a batch dimension, as in TensorRT-LLM: its clients read ``as_numpy(...)[0]``.
        return [pb_utils.Tensor("text_output", np.array([part.text.encode()], object))]
