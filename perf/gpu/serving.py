"""Part `serving`: TTFT, ITL and tokens per second, apart (P/D) and together (aggregated).

Both are measured in the same server, one after the other: all streams at once, and the time between
tokens of some streams, alone and while long prompts are computed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from tests.servers import Running

from perf.answers import Answer, Summary, summarize
from perf.budgets import Budget
from perf.gpu.outcome import Outcome, Rows
from perf.gpu.scale import Scale, Serving
from perf.gpu.server import BASELINE
from perf.gpu.streams import texts, timed

MODELS = ("pdserve", BASELINE)
COLUMNS = ["model", "load", "TTFT ms, p50 / p99", "ITL ms, p50 / p99", "gap ms, p50 / p99", "tok/s"]


class Measured(Struct):
    """One load on one model."""

    model: str
    load: str
    summary: Summary


def run(outcome: Outcome, scale: Scale, server: Running) -> None:
    """Put the loads on both models of a running server."""
    found: list[Measured] = []
    for model in MODELS:
        asyncio.run(timed(server.grpc, model, _work(2, 1, scale.serving.prompt, 0), 4))
        for load, answers in asyncio.run(_loads(server.grpc, model, scale.serving)).items():
            found.append(Measured(model, load, summarize(answers)))
            outcome.table(_table(found))
            outcome.data("serving", found)
    by_model = {(one.model, one.load): one.summary for one in found}
    for model in MODELS:
        quiet, disturbed = (by_model[model, load].gap_ms for load in ("quiet", "long prompts"))
        if quiet is not None and disturbed is not None:
            what = f"{model}: p99 of the time between responses, while prompts are computed"
            ratio = round(disturbed.p99 / quiet.p99, 2)
            outcome.target(Budget(what, ratio, "x of quiet", "at most", None))


async def _loads(address: str, model: str, sizes: Serving) -> dict[str, list[Answer]]:
    """Return the answers of each load."""
    full = _work(sizes.streams, sizes.requests, sizes.prompt, 1)
    steady = _work(max(sizes.streams // 2, 1), 1, sizes.prompt, 2)
    again = _work(max(sizes.streams // 2, 1), 1, sizes.prompt, 3)
    long = _work(1, sizes.long_prompts, sizes.long_prompt, 4)
    answers = {
        "all at once": await timed(address, model, full, sizes.output),
        "quiet": await timed(address, model, steady, sizes.requests * sizes.output),
    }
    disturbed, _ = await asyncio.gather(
        timed(address, model, again, sizes.requests * sizes.output),
        timed(address, model, long, 1),
    )
    answers["long prompts"] = disturbed
    return {load: list(itertools.chain(*some)) for load, some in answers.items()}


def _work(streams: int, requests: int, tokens: int, seed: int) -> list[list[str]]:
    made = texts(streams * requests, tokens, seed)
    return np.array(made, dtype=object).reshape(streams, requests).tolist()  # type: ignore[no-any-return]


def _table(found: Sequence[Measured]) -> Rows:
    rows = []
    for one in found:
        s = one.summary
        times = [s.ttft_ms, s.itl_ms, s.gap_ms]
        cells = ["-" if t is None else f"{t.p50:.1f} / {t.p99:.1f}" for t in times]
        rows.append([one.model, one.load, *cells, f"{s.tokens_per_s:.0f}"])
    return Rows("Serving: P/D (pdserve) and aggregated, in one server", COLUMNS, rows)
