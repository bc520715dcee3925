"""What the answers of a server are compared with: the same model, in one process and alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from transformers import AutoModelForCausalLM

from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.engines.pytorch.decode import TorchDecode
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.prefill import TorchPrefill
from pdserve.sampling import Sampling
from pdserve.transfer import arrays
from perf.gpu.scale import Scale

BLOCK = 16


class OneModel:
    """Prefill and decode of one sequence by this package's engine, with no transfer between them.

    Args:
        longest: tokens of the longest prompt and answer together.
    """

    def __init__(self, folder: Path, scale: Scale, longest: int) -> None:
        self._model = TorchModel(str(folder), scale.device, scale.dtype, 1)
        self._prefill = TorchPrefill(self._model)
        self._decode = TorchDecode(self._model, -(-longest // BLOCK), BLOCK)

    def answer(self, prompt: Sequence[int], output: int, sampling: Sampling) -> list[int]:
        """Return the tokens of an answer."""
        ids = np.array(prompt, np.int32)
        shape = self._model.layout.shape(len(ids))
        job = PrefillJob(ids, arrays.like(self._decode.pool, shape), sampling)
        (first,) = self._prefill.prefill([job])
        rows = [(0, len(ids) + output)]
        sequence = DecodeSequence(ids, [first], rows, sampling)
        arrays.scatter(job.kv, self._decode.pool, sequence.rows(len(ids)))
        while len(sequence.tokens) < output:
            sequence.tokens += self._decode.step([sequence])
        return sequence.tokens


class Gaps(Struct):
    """How far each token of a greedy answer is from the largest logit by transformers itself."""

    tokens: int
    largest: int
    """Number of tokens that have the largest logit."""
    worst: float
    """Largest distance, as a share of the standard deviation of the logits."""


class Transformers:
    """transformers' own forward, in the same dtype and on the same device."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, scale.dtype)
        )
        self._model = loaded.to(scale.device).eval()
        self._device = scale.device

    @torch.inference_mode()
    def gaps(self, prompt: Sequence[int], answer: Sequence[int]) -> Gaps:
        """Compute the logits of the answer's tokens, with the tokens before each as they are."""
        ids = torch.tensor([[*prompt, *answer]], device=self._device)
        logits = self._model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        taken = logits.gather(1, torch.tensor(answer, device=self._device)[:, None])[:, 0]
        gap = (logits.max(1).values - taken) / logits.std(1)
        return Gaps(len(answer), int((gap == 0).sum()), float(gap.max()))
