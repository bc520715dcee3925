"""Forwards of one shape, whose bits do not depend on what else is computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pdserve.engines.protocol import Tokens
from pdserve.engines.pytorch.attention import DecodeMemory, PrefillMemory
from pdserve.engines.pytorch.model import TorchModel

# Rows of a forward whose bits may not depend on the batch: a constant, so that every operation has
# one shape. 16 cost hardly more than 4; see `linear.py`.
FIXED_ROWS = 16


def replay(model: TorchModel, tokens: Tokens, resumed_tokens: int, kv: Tensor) -> Tensor:
    """Compute the last ``resumed_tokens`` as they were first; return the logits of the next token.

    The prompt before them is computed as by a prefill, and each of them as one row of a decode
    step, as before: here the other rows of the steps are the neighbouring resumed tokens, which are
    known. So all K and V have the same bits as before, for a sixteenth of the forwards.

    Args:
        resumed_tokens: number of tokens, at least 1; see ``PrefillRequest``.
        kv: [layers, 2, tokens, kv_heads, head_dim], to be filled.
    """
    given = len(tokens) - resumed_tokens
    memory = PrefillMemory([kv[:, :, :given]], [0], lambda _: None)
    model.forward(tokens[:given].astype(np.int64), np.arange(given), np.array([], np.int64), memory)
    logits = torch.empty(0)
    for begin in range(given, len(tokens), FIXED_ROWS):
        rows = np.arange(begin, min(begin + FIXED_ROWS, len(tokens)))
        pad = np.zeros(FIXED_ROWS - len(rows), np.int64)
        steps = DecodeMemory(
            kv,
            torch.as_tensor(rows, device=kv.device),
            [[(0, row + 1)] for row in rows.tolist()],
            [True] * len(rows),
            len(pad),
        )
        positions = np.append(rows, pad)
        logits = model.forward(np.append(tokens[rows], pad), positions, None, steps)[: len(rows)]
    return logits[-1:]
