"""Decode with torch: generates tokens from KV caches, in one running batch over a paged pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pdserve.engines.protocol import DecodeSequence
from pdserve.engines.pytorch.attention import DecodeMemory, PrefillMemory
from pdserve.engines.pytorch.fixed_shapes import FIXED_ROWS, replay
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.sampling import Choice, sample
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array


class TorchDecode:
    """The decode role of a model.

    Calls are made from one thread; others may write to unused rows of ``pool`` meanwhile.

    Args:
        blocks, block_size: number of the pool's blocks, and of the tokens in each.
    """

    def __init__(self, model: TorchModel, blocks: int, block_size: int) -> None:
        layout, rows = model.layout, blocks * block_size
        place, shape = model.device, layout.shape(rows)
        self.pool: Array = (
            arrays.aligned(shape)
            if place.type == "cpu"
            else torch.zeros(shape, dtype=torch.uint8, device=place)
        )
        """The pool as bytes, [planes, rows, row_bytes]."""
        seen = torch.as_tensor(self.pool).view(getattr(torch, layout.dtype))
        self._pool = seen.view(layout.layers, 2, rows, layout.kv_heads, layout.head_dim)
        self._model = model

    def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        """Compute tokens `begin` to `end` of a prompt; return the first token if that is its end.

        A single run is computed in place, as a prefill does with its range. Several runs are
        joined, which gives exactly the bits that one would, and are copied back.
        """
        runs = [self._pool.narrow(2, *run) for run in sequence.rows(end)]
        kv = runs[0] if len(runs) == 1 else torch.cat(runs, 2)
        last = [end - begin - 1] if end == len(sequence.prompt) else []
        if sequence.resumed_tokens and sequence.sampling.reproducible:
            logits = replay(self._model, sequence.prompt, sequence.resumed_tokens, kv)
        else:
            logits = self._model.forward(
                sequence.prompt[begin:end].astype(np.int64),
                np.arange(begin, end),
                np.array(last, np.int64),
                PrefillMemory([kv], [begin], lambda _: None),
            )
        if len(runs) > 1:
            for run, part in zip(runs, kv.split([run.shape[2] for run in runs], 2), strict=True):
                run.copy_(part)
        if not last:
            return None
        return sample(
            logits, [Choice(sequence.sampling, sequence.prompt, (), sequence.resumed_tokens)]
        )[0]

    def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        """Return the next token of each sequence.

        Reproducible sequences are computed FIXED_ROWS at a time, in forwards that are filled up
        with other sequences; the remaining sequences have an ordinary forward.
        """
        order = sorted(range(len(batch)), key=lambda i: not batch[i].sampling.reproducible)
        reproducible = sum(sequence.sampling.reproducible for sequence in batch)
        tokens = [0] * len(batch)
        begin = 0
        while begin < len(batch):
            fixed = begin < reproducible
            chunk = order[begin : begin + FIXED_ROWS] if fixed else order[begin:]
            chosen = self._forward([batch[i] for i in chunk], fixed)
            for i, token in zip(chunk, chosen, strict=True):
                tokens[i] = token
            begin += len(chunk)
        return tokens

    def close(self) -> None:
        """Let go of the pool."""
        self.pool, self._pool = arrays.like(self.pool, (0, 0, 0)), self._pool.new_empty(0)

    def _forward(self, batch: Sequence[DecodeSequence], fixed: bool) -> list[int]:
        pad = FIXED_ROWS - len(batch) if fixed else 0
        runs = [sequence.rows(sequence.length) for sequence in batch]
        written = [first + rows - 1 for first, rows in (cut[-1] for cut in runs)]
        memory = DecodeMemory(
            self._pool,
            torch.tensor(written, device=self._pool.device),
            runs,
            [sequence.sampling.reproducible for sequence in batch],
            pad,
        )
        logits = self._model.forward(
            [sequence.tokens[-1] for sequence in batch] + [0] * pad,
            [sequence.length - 1 for sequence in batch] + [0] * pad,
            None,
            memory,
        )
        choices = [Choice(s.sampling, s.prompt, s.tokens, s.resumed_tokens) for s in batch]
        return sample(logits[: len(batch)], choices)
