"""The requests of a plan, and what their clients do."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.unit.inprocess import VOCABULARY

if TYPE_CHECKING:
    from tests.simulation.plan import Plan


@dataclass(frozen=True)
class Asked:
    """A request, and what its client does meanwhile. Times are in seconds."""

    number: int
    at: float
    gateway: int
    prompt: bytes
    max_tokens: int
    fields: dict[str, Any]
    """The other fields of its `pdserve.gateway.parameters.Parameters`."""
    in_text: bool = False
    """Prompt and answer are text; otherwise they are token ids."""
    cancels_after: float = math.inf
    leaves_after: int = 0
    """The number of parts after which its client leaves; 0: it wants all of them."""
    stops_after: int = 0
    """A stop string is complete after at most this many tokens; 0: there is none."""
    reads_s: float = 0.0
    """The client takes this long to read each chunk."""


def draw(plan: Plan, longest: int, rng: random.Random) -> tuple[Asked, ...]:
    """Draw the requests of a plan from `rng`, with which the plan then draws its faults."""
    count = rng.randint(8, 36)
    timing = plan.profile["prefill"]
    each_s = (timing["base_ms"] + timing["per_token_ms"] * longest / 4) / 1e3
    load = rng.choice((0.3, 0.9, 1.5, 5.0))
    interval = each_s / plan.prefills / min(plan.prefill.slots, 2) / load
    bursts = rng.choice((1, 1, 6, count))
    openings = [_tokens(rng, 32) for _ in range(2)]
    at, asked = 0.0, []
    for number in range(count):
        if number % bursts == 0:
            at += rng.expovariate(1 / (interval * bursts))
        at += rng.uniform(0, 1e-4)
        asked.append(_request(plan, number, at, longest, openings, rng))
    return tuple(asked)


def _request(
    plan: Plan, number: int, at: float, longest: int, openings: list[bytes], rng: random.Random
) -> Asked:
    tokens = rng.randint(1, longest - 5)
    prompt = _tokens(rng, tokens)
    if longest > 60 and rng.random() < 0.3:
        prompt = (rng.choice(openings) + prompt)[: 4 * (longest - 5)]
    most = min(longest - len(prompt) // 4, 40)
    fields: dict[str, Any] = {
        "stream": rng.random() < 0.7,
        "ignore_eos": rng.random() < 0.3,
        "tenant": rng.choice(("", "", "a")),
        "priority": rng.choice((0, 0, 0, 1, -1)),
        "ttft_limit_ms": round(1e3 * rng.uniform(4.0, 8.0) * (5 if plan.calm else 1)),
    }
    if rng.random() < 0.15:
        fields["sampling"] = {"temperature": 1.0, "seed": number}
    if rng.random() < 0.15:
        fields["ttft_limit_ms"] = round(1e3 * 10 ** rng.uniform(-2.5, 0.0))
    if rng.random() < 0.1:
        fields["timeout_us"] = round(1e6 * 10 ** rng.uniform(-2, 0.7))
    if rng.random() < 0.02:
        prompt = _tokens(rng, plan.arena_bytes // 128 + 1)  # no arena has room for it
    return Asked(
        number=number,
        at=at,
        gateway=rng.randrange(plan.gateways),
        prompt=prompt,
        max_tokens=rng.randint(1, most),
        fields=fields,
        cancels_after=10 ** rng.uniform(-4, 0) if rng.random() < 0.15 else math.inf,
        stops_after=rng.randint(1, 10) if rng.random() < 0.1 else 0,
        reads_s=rng.choice((0.002, 0.05)) if rng.random() < 0.1 and not plan.calm else 0.0,
    )


def _tokens(rng: random.Random, count: int) -> bytes:
    return np.array([rng.randrange(3, VOCABULARY) for _ in range(count)], "<i4").tobytes()


def answered(requests: tuple[Asked, ...], seed: int) -> tuple[Asked, ...]:
    """Draw for each request whether it is answered in text, and whether its client leaves early."""
    rng = random.Random(f"{seed} answers")
    return tuple(
        replace(
            asked,
            in_text=rng.random() < 0.5,
            leaves_after=rng.randint(1, 4) if rng.random() < 0.05 else 0,
        )
        for asked in requests
    )
