"""Prefill with torch: computes the KV caches and first tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pdserve.engines.protocol import PrefillJob
from pdserve.engines.pytorch.attention import PrefillMemory
from pdserve.engines.pytorch.fixed_shapes import replay
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.sampling import Choice, sample


class TorchPrefill:
    """The prefill role of a model. Calls block, and are made from one thread."""

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        layout = model.layout
        self._dtype = getattr(torch, layout.dtype)
        self._shape = (layout.layers, 2, -1, layout.kv_heads, layout.head_dim)

    def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        """Fill every job's range; return the first token of each.

        The uncached tokens of all jobs are computed in one forward. A job whose sampling is
        reproducible must be alone and have no cached prefix, so that its bits depend on its prompt
        only.
        """
        kv = [torch.as_tensor(job.kv).view(self._dtype).view(self._shape) for job in jobs]
        cached = [job.cached for job in jobs]

        def filled(layers: int) -> None:
            for job in jobs:
                job.filled(2 * layers)

        first = jobs[0]
        if first.resumed_tokens and first.sampling.reproducible:
            logits = replay(self._model, first.tokens, first.resumed_tokens, kv[0])
            filled(self._model.layout.layers)
        else:
            logits = self._model.forward(
                np.concatenate([job.tokens[job.cached :] for job in jobs]),
                np.concatenate([np.arange(job.cached, len(job.tokens)) for job in jobs]),
                np.cumsum([len(job.tokens) - job.cached for job in jobs]) - 1,
                PrefillMemory(kv, cached, filled),
            )
        return sample(
            logits, [Choice(job.sampling, job.tokens, (), job.resumed_tokens) for job in jobs]
        )
