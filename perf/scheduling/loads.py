"""The loads of a run, each with the policies and layouts that serve it."""

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
"""Number of tokens of a prompt, where all prompts have the same length."""
USERS_TOKENS, USERS_OUTPUTS = (200, 1800), 64
TRACES = {"conversations": "azure_llm_2023_conv.csv", "code": "azure_llm_2023_code.csv"}
TRACE_LOAD, TIDE_LOAD, GATEWAYS_LOAD = 80, 70, 150
PATIENCE, PATIENCE_S = 100.0, 10.0
"""Limits so wide that all requests are answered, since the traces measure how late each is."""
TIDES = {"tide": 0.0, "tide, prefixes": 0.7}
"""Share of requests that begin with a prefix of their scenario, by name of the load."""
POISSON, USERS, MANY_GATEWAYS = "poisson", "users", f"{GATEWAYS} gateways"
PARTS = (POISSON, USERS, *TRACES, *TIDES, MANY_GATEWAYS)
DEPTH = 0.5


@dataclass(frozen=True)
class Load:
    """The requests of one run."""

    part: str
    level: int
    """Percent of the prefills' capacity, or number of users."""
    chains: Sequence[Chain]
    policies: Sequence[PolicyName] = ("on_demand",)
    layouts: Sequence[Layout] = ("pool",)
    until: float = math.inf
    settle_s: float = 0.0
    """Seconds at the beginning that are not counted."""

    @property
    def seconds(self) -> float:
        return self.until if self.until < math.inf else self.chains[-1][-1].due

    @property
    def short(self) -> float:
        """Return the maximum tokens of a short prompt: half of the mean."""
        return float(np.mean([ask.tokens for chain in self.chains for ask in chain])) / 2


@dataclass(frozen=True)
class Effort:
    """The extent of the measurement."""

    policies: Sequence[PolicyName]
    percents: Sequence[int]
    users: Sequence[int]
    requests: int
    """Number of requests of a Poisson process."""
    trace_requests: int
    gateway_requests: int
    """A large number, since otherwise chance would dominate the differences between gateways."""
    users_s: float
    tide_s: float
    tides: int


FULL = Effort(POLICIES, (50, 80, 100, 120, 150), (8, 11, 14, 17, 20), 400, 300, 2000, 10.0, 12.0, 2)
QUICK = Effort(("on_demand", "fewest_streams"), (80, 150), (8, 14), 120, 60, 200, 4.0, 6.0, 1)


def all_of(effort: Effort, added_s: float, traces: Path | None) -> Iterator[Load]:
    """Yield every load.

    Args:
        added_s: difference between an unloaded server's TTFT and the prefill's time.
        traces: folder of the traces; None: they are left out.
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
    """Return two scenarios of equal work, one high when the other is low; `hits` as in `TIDES`."""

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
    """Return the number of tokens of every prompt of a trace. Raises OSError or ValueError."""
    with path.open(newline="") as file:
        return [int(row["ContextTokens"]) for row in csv.DictReader(file)]
