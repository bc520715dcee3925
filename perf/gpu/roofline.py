"""The rates that bound a step: of the device's memory, and of its arithmetic, measured here."""

from __future__ import annotations

from functools import partial

import torch
from msgspec import Struct

from perf.gpu.model import Shape
from perf.gpu.place import Place
from perf.gpu.scale import Scale


class Rates(Struct):
    """The highest rates that were measured."""

    bytes_per_s: float
    """Bytes read and bytes written, by a copy within the device."""
    flop_per_s: float
    """A multiplication and an addition are two."""


def measured(scale: Scale, place: Place) -> Rates:
    """Measure a copy, and a product of square matrices in the scale's dtype."""
    steps, dtype = scale.steps, getattr(torch, scale.dtype)
    nbytes = steps.copied_mib << 20
    source = torch.ones(nbytes, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    copied = place.device_ms(partial(target.copy_, source), steps.repeats) / 1e3
    del source, target
    # Random numbers, since those of zeros take less power, and so run at a higher clock.
    one, other = (
        torch.randn(steps.square, steps.square, dtype=dtype, device=scale.device) for _ in range(2)
    )
    made = torch.empty_like(one)
    product = place.device_ms(partial(torch.mm, one, other, out=made), steps.repeats) / 1e3
    return Rates(2 * nbytes / copied, 2 * steps.square**3 / product)


def step_s(rates: Rates, shape: Shape, itemsize: int, batch: int, context: int) -> float:
    """Return the least seconds of a decode step: weights once, and K and V of every sequence."""
    kv = batch * context * shape.layers * 2 * shape.kv_heads * shape.head_dim
    return (shape.weights + kv) * itemsize / rates.bytes_per_s


def prompt_s(rates: Rates, shape: Shape, tokens: int) -> float:
    """Return the least seconds of a prompt: its matrix products, and half of a full attention."""
    head = shape.hidden * shape.vocabulary  # of the last token only
    products = 2 * (shape.weights - head) * tokens + 2 * head
    attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return (products + attention) / rates.flop_per_s
