"""The loads of a run, each with what is to serve it."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.baselines.policies import PolicyName
from perf.scheduling.servers import GATEWAYS, POLICIES, PREFILLS, SCENARIOS, Layout
from perf.scheduling.workload import (
    Chain,
    Limits,
    Tide,
    capacity,
    closed,
    poisson,
    tidal,
)

TOKENS = 1000
"""Of a prompt where all are alike."""
USERS_TOKENS, USERS_OUTPUTS = (200, 1800), 64
TRACES = {"conversations": "azure_llm_2023_conv.csv", "code": "azure_llm_2023_code.csv"}
TRACE_LOAD, TIDE_LOAD, GATEWAYS_LOAD = 80, 70, 150
PATIENCE, PATIENCE_S = 100.0, 10.0
"""Limits so wide that all are answered: how late each is, is what is asked of the traces."""
TIDES = {"tide": 0.0, "tide, prefixes": 0.7}
"""By name: the share of requests that begin with a prefix of their scenario's."""
POISSON, USERS, MANY_GATEWAYS = "poisson", "users", f"{GATEWAYS} gateways"
PARTS = (POISSON, USERS, *TRACES, *TIDES, MANY_GATEWAYS)
DEPTH = 0.5


@dataclass(frozen=True)
class Load:
    """What one run asks for."""

    part: str
    level: int
    """Percent of what the prefills can compute, or users."""
    chains: Sequence[Chain]
    policies: Sequence[PolicyName] = ("on_demand",)
    layouts: Sequence[Layout] = ("pool",)
    until: float = math.inf
    settle_s: float = 0.0
    """Not counted, at the beginning."""

    @property
    def seconds(self) -> float:
        return self.until if self.until < math.inf else self.chains[-1][-1].due

    @property
    def short(self) -> float:
        """Prompts of so many tokens at most are short: half of the mean."""
        return float(np.mean([ask.tokens for chain in self.chains for ask in chain])) / 2


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    policies: Sequence[PolicyName]
    percents: Sequence[int]
    users: Sequence[int]
    requests: int
    """Of a Poisson process."""
    trace_requests: int
    gateway_requests: int
    """Many, since chance alone would tell the gateways apart."""
    users_s: float
    tide_s: float
    tides: int


FULL = Effort(POLICIES, (50, 80, 100, 120, 150), (8, 11, 14, 17, 20), 400, 300, 2000, 10.0, 12.0, 2)
QUICK = Effort(("on_demand", "fewest_streams"), (80, 150), (8, 14), 120, 60, 200, 4.0, 6.0, 1)


def all_of(effort: Effort, added_s: float, traces: Path | None) -> Iterator[Load]:
    """Every load.

    Args:
        added_s: by this an unloaded server's TTFT is longer than the prefill.
        traces: the folder that they lie in; None: they are left out.
    """
    limits = Limits(added_s)
    for percent in effort.percents:
        lengths = [TOKENS] * effort.requests
        yield Load(POISSON, percent, _at(percent, lengths, limits), effort.policies)
    for users in effort.users:
        each = round(effort.users_s / limits(USERS_TOKENS[0])) + 1
        yield Load(
            USERS,
            users,
            closed(random.Random(users), users, USERS_TOKENS, USERS_OUTPUTS, limits, each),
            effort.policies,
            until=effort.users_s,
            settle_s=effort.users_s / 5,
        )
    if traces is not None:
        compared: Sequence[PolicyName] = ("on_demand", "round_robin", "shortest_queue")
        for name, file in TRACES.items():
            chosen = random.Random(file).choices(trace(traces / file), k=effort.trace_requests)
            chains = _at(TRACE_LOAD, chosen, Limits(added_s, PATIENCE, PATIENCE_S))
            yield Load(name, TRACE_LOAD, chains, [p for p in compared if p in effort.policies])
    for part, hits in TIDES.items():
        some = tides(hits, effort.tide_s)
        chains = tidal(random.Random(part), some, effort.tides * effort.tide_s, limits)
        yield Load(part, TIDE_LOAD, chains, layouts=("pool", "groups"))
    lengths = [TOKENS] * effort.gateway_requests
    chains = _at(GATEWAYS_LOAD, lengths, limits)
    yield Load(MANY_GATEWAYS, GATEWAYS_LOAD, chains, layouts=("gateways",))


def _at(percent: int, lengths: Sequence[int], limits: Limits) -> list[Chain]:
    rate = percent / 100 * capacity(lengths, PREFILLS)
    return poisson(random.Random(percent), rate, lengths, limits)


def tides(hits: float, period_s: float) -> list[Tide]:
    """Two scenarios of as much work, one high when the other is low; `hits` as in `TIDES`."""

    def tide(
        scenario: str, phase: float, tokens: tuple[int, int], prefixes: int, shared: int
    ) -> Tide:
        whole = capacity([sum(tokens) // 2], 1)
        rate = TIDE_LOAD / 100 * whole
        return Tide(scenario, rate, DEPTH, period_s, phase, tokens, hits, prefixes, shared)

    chat, documents = SCENARIOS
    return [
        tide(chat, 0.25, (300, 700), 24, 256),
        tide(documents, 0.75, (3000, 5000), 8, 2048),
    ]


def trace(path: Path) -> list[int]:
    """Tokens of every prompt of a trace. Raises: OSError, ValueError."""
    with path.open(newline="") as file:
        return [int(row["ContextTokens"]) for row in csv.DictReader(file)]
