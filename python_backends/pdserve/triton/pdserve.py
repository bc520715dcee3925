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
from pdserve.gateway.service import Prompt
from pdserve.text.tokenizer import Tokenizer, parse_prompt
from pdserve.text.vocabulary import Vocabulary
from pdserve.triton.gateway import GatewayModel

# Bytes above which a text is tokenized in another thread, so that other streams go on.
LONG_TEXT = 16 << 10


class TritonPythonModel(GatewayModel):
    prompt_input = "text_input"
    answers_in_text = True

    def read(self, model: Path) -> Vocabulary:
        self._tokenizer = Tokenizer(model)
        return self._tokenizer

    async def prompt(self, inputs: Tensors) -> Prompt:
        data: bytes = scalar(inputs, "text_input")
        limit = self.deployment.gateway.max_prompt_bytes
        if len(data) > limit:
            raise InvalidRequest(f"text_input: {len(data)} bytes; at most {limit} are allowed")
        chat = bool(scalar(inputs, "chat"))
        if len(data) > LONG_TEXT:
            loop = asyncio.get_running_loop()
            ids, beginning = await loop.run_in_executor(None, self._encode, data, chat)
        else:
            ids, beginning = self._encode(data, chat)
        if not ids.size:
            raise InvalidRequest("text_input: no tokens; at least 1 is needed")
        echo = scalar(inputs, "exclude_input_in_output")
        return Prompt(ids, data.decode() if echo is not None and not echo else "", beginning)

    def _encode(self, data: bytes, chat: bool) -> tuple[Tokens, str]:
        """Return the token ids, and the text that rules match (a conversation's first turn)."""
        prompt = parse_prompt(data, chat)
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt), prompt
        return self._tokenizer.encode_chat(prompt), prompt[0]["content"]

    def outputs(self, text: str, ids: list[int]) -> list[Any]:
        # Without a batch dimension, as in TensorRT-LLM: its clients read ``as_numpy(...)[0]``.
        return [pb_utils.Tensor("text_output", np.array([text.encode()], object))]
