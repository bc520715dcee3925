"""Part `exact`: the tokens of the real Triton, with prefill and decode on the device, are right.

- Requests with a seed, many at once, have exactly the tokens of one model in this process and in
  the same dtype, with no transfer between its prefill and decode.
- Greedy requests, one after another and at once, have tokens with the largest logit by transformers
  itself, up to the rounding of the dtype.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tests.servers import Running

from pdserve.sampling import Sampling
from perf.budgets import Budget
from perf.gpu.outcome import Outcome
from perf.gpu.reference import OneModel, Transformers
from perf.gpu.scale import Scale
from perf.gpu.streams import End, asked, prompts

TEMPERATURE = 1.0
ROUNDING = {"float32": 0.01, "bfloat16": 0.25, "float16": 0.05}
"""Largest gap of a greedy token, as a share of the standard deviation of the logits. Any other
token is some 3 of them away from the largest."""


def run(outcome: Outcome, scale: Scale, server: Running) -> None:
    """Compare answers of a running server with those of one model."""
    sizes, folder = scale.serving, Path(server.deployment.model)
    asks = prompts(sizes.exact, sizes.long_prompt, seed=1)
    sampled = asyncio.run(_all(server, asks, sizes.exact_output, sampled=True))
    alone = asyncio.run(_each(server, asks, sizes.exact_output))
    together = asyncio.run(_all(server, asks, sizes.exact_output, sampled=False))

    one = OneModel(folder, scale, sizes.long_prompt + sizes.exact_output)
    seeds = [Sampling(temperature=TEMPERATURE, seed=n) for n in range(len(asks))]
    expected = [
        one.answer(ask, sizes.exact_output, seed) for ask, seed in zip(asks, seeds, strict=True)
    ]
    wrong = [
        f"prompt of {len(ask)}: {end.error or _difference(end.tokens, right)}"
        for ask, end, right in zip(asks, sampled, expected, strict=True)
        if end.tokens != right or end.error
    ]
    outcome.check(f"{len(asks)} answers with a seed, at once: the tokens of one model", wrong)

    theirs, limit = Transformers(folder, scale), ROUNDING[scale.dtype]
    for name, ends in (("one after another", alone), ("at once", together)):
        found = [
            (ask, end, theirs.gaps(ask, end.tokens))
            for ask, end in zip(asks, ends, strict=True)
            if end.tokens
        ]
        wrong = [
            f"prompt of {len(ask)}: {end.error}"
            for ask, end in zip(asks, ends, strict=True)
            if end.error
        ]
        wrong += [
            f"prompt of {len(ask)}: a token {gaps.worst:.2g} from the largest logit"
            for ask, _, gaps in found
            if gaps.worst > limit
        ]
        outcome.check(f"{len(asks)} greedy answers, {name}: the largest logits", wrong)
        tokens = sum(gaps.tokens for *_, gaps in found)
        share = sum(gaps.largest for *_, gaps in found) / max(tokens, 1)
        what = f"greedy tokens, {name}, that are transformers' own"
        outcome.target(Budget(what, round(100 * share, 2), f"% of {tokens}", "at least", None))


def _difference(tokens: Sequence[int], right: Sequence[int]) -> str:
    pairs = enumerate(zip(tokens, right, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(right)))
    return f"{len(tokens)} of {len(right)} tokens, the first other one {first}"


async def _all(
    server: Running, asks: Sequence[Sequence[int]], output: int, *, sampled: bool
) -> list[End]:
    return await asyncio.gather(
        *(
            asked(server, ask, output, tenant=f"{sampled}-{n}", **_sampling(n if sampled else None))
            for n, ask in enumerate(asks)
        )
    )


async def _each(server: Running, asks: Sequence[Sequence[int]], output: int) -> list[End]:
    return [await asked(server, ask, output, tenant=f"each-{n}") for n, ask in enumerate(asks)]


def _sampling(seed: int | None) -> dict[str, float | int]:
    return {} if seed is None else {"temperature": TEMPERATURE, "seed": seed}
