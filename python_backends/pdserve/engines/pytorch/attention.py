"""Attention over this package's KV memory, called by transformers' own model code.

A model loaded with ``attn_implementation=NAME`` passes each layer's query, key and value,
position-encoded, to the ``kv_memory`` of its forward call. Sequences are concatenated in a batch of
one, so nothing is padded and no mask is built:

    query [heads, n, head_dim], key and value [kv_heads, n, head_dim]

The query heads that share a KV head are folded into one matrix, [kv_heads, group, n, head_dim], so
that K and V are read in place: neither repeated nor copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "pdserve"


class KVMemory(Protocol):
    """Memory for the K and V of one forward call, which its queries attend to."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
    ) -> Tensor:
        """Return the attention of all sequences, [n, heads, head_dim].

        ``options`` are the model's own.
        """


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    kv_memory: KVMemory,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return kv_memory.attend(layer, query[0], key[0], value[0], scale, **options)[None], None


AttentionInterface.register(NAME, _attention)


class PrefillMemory:
    """Memory of a prefill: each prompt's K and V are written after its cached prefix, in place.

    Args:
        kv: the range of each prompt, [layers, 2, tokens, kv_heads, head_dim].
        cached: number of rows of each that are cached; the others are in this forward.
        filled: called with the number of complete layers.
    """

    def __init__(
        self, kv: Sequence[Tensor], cached: Sequence[int], filled: Callable[[int], None]
    ) -> None:
        self._kv = kv
        self._filled = filled
        self._cached = cached
        new = (each.shape[2] - rows for each, rows in zip(kv, cached, strict=True))
        self._spans = [slice(*span) for span in pairwise(accumulate(new, initial=0))]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any
    ) -> Tensor:
        outputs = []
        for kv, cached, span in zip(self._kv, self._cached, self._spans, strict=True):
            stored = kv[layer].transpose(1, 2)
            stored[0, :, cached:].copy_(key[:, span])
            stored[1, :, cached:].copy_(value[:, span])
            q = _folded(query[:, span], key.shape[0])
            k, v = (_shared(heads, q) for heads in stored)
            if cached:
                output = _merged(
                    [
                        _partial(q, k[:, :, :cached], v[:, :, :cached], scale),
                        _partial(q, k[:, :, cached:], v[:, :, cached:], scale, causal=True),
                    ]
                )
            else:
                output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            outputs.append(output.flatten(0, 1).transpose(0, 1))
        self._filled(layer + 1)
        return torch.cat(outputs)


class DecodeMemory:
    """Memory of a decode step: each sequence's new token is written to its row of the pool first.

    Args:
        pool: [layers, 2, rows, kv_heads, head_dim].
        rows: int64 [sequences], the row of each new token.
        runs: each sequence's (first row, rows) in order, the new token's row included.
        whole: for each sequence, whether its runs must give exactly the bits that one run would.
        pad: rows of the forward without a sequence; they attend to nothing and get zeros.
    """

    def __init__(
        self,
        pool: Tensor,
        rows: Tensor,
        runs: Sequence[Sequence[tuple[int, int]]],
        whole: Sequence[bool],
        pad: int = 0,
    ) -> None:
        self._pool = pool
        self._rows = rows
        self._pad = pad
        self._whole = whole
        # All layers' views are made at once: making them one by one costs as much as the attention.
        self._views = [
            [
                pool.narrow(2, first, rows).transpose(2, 3).unsqueeze(2).flatten(0, 1).unbind()
                for first, rows in sequence
            ]
            for sequence in runs
        ]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any
    ) -> Tensor:
        batch = len(self._views)
        self._pool[layer, 0].index_copy_(0, self._rows, key[:, :batch].transpose(0, 1))
        self._pool[layer, 1].index_copy_(0, self._rows, value[:, :batch].transpose(0, 1))
        # [sequences, kv_heads, group, head_dim]: the group takes the place of a sequence's tokens.
        queries = _folded(query, key.shape[0]).permute(2, 0, 1, 3).split(1)
        outputs: list[Tensor] = []
        # The queries of the padding come after those of the sequences.
        for q, views, whole in zip(queries, self._views, self._whole, strict=False):
            parts = [(run[2 * layer], run[2 * layer + 1]) for run in views]
            if len(parts) > 1 and not whole:
                outputs.append(_merged([_partial(q, k, v, scale) for k, v in parts]))
                continue
            k, v = parts[0]
            if len(parts) > 1:
                k, v = (torch.cat(each, 2) for each in zip(*parts, strict=True))
            outputs.append(scaled_dot_product_attention(q, k, v, scale=scale))
        if self._pad:
            outputs.append(query.new_zeros(self._pad, *outputs[0].shape[1:]))
        return torch.cat(outputs).flatten(1, 2)


def _folded(query: Tensor, kv_heads: int) -> Tensor:
    """Reshape [heads, n, head_dim] to [kv_heads, group, n, head_dim], as a view."""
    heads, *rest = query.shape
    return query.view(kv_heads, heads // kv_heads, *rest)


def _shared(heads: Tensor, query: Tensor) -> Tensor:
    """Expand [kv_heads, n, head_dim] to [kv_heads, group, n, head_dim], as a view."""
    return heads[:, None].expand(-1, query.shape[1], -1, -1)


def _partial(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the attention to a part, [b, h, n, head_dim], and its log-sum-exp, [b, h, n]."""
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    else:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    return output, lse[..., : query.shape[2]]


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the attention to the whole sequence, from the attention to its parts."""
    outputs, lses = zip(*parts, strict=True)
    weights = torch.stack(lses).softmax(0).unsqueeze(-1)
    return (torch.stack(outputs) * weights).sum(0).to(outputs[0].dtype)
