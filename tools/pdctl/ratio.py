"""The ratio of prefills and decodes that each group should have, from its servers' metrics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from pdserve import config
from pdserve.control.ratio import Advice, Observation, advise
from pdserve.control.work import Work, decode_rate, prefill_rate

SAMPLES = 13
"""Number of samples in a window: what waits is averaged over them."""
COMMON = {"busy_s": "pdserve_busy_seconds_total", "slot_s": "pdserve_slot_seconds_total"}
"""Counters of both roles, by the fields of ``Work``."""
DECODES = {
    "completed": "pdserve_decode_seconds_count",
    "steps": "pdserve_steps_total",
    "sequences": "pdserve_step_sequences_total",
    "sequences_squared": "pdserve_step_sequences_squared_total",
    "sequence_s": "pdserve_step_sequence_seconds_total",
}
_LABELS = re.compile(r'(\w+)="([^"]*)"')


class Sample:
    """The series of all servers of a deployment at one moment.

    Args:
        pages: each server's series (``pdctl.status.values``).
    """

    def __init__(self, pages: Sequence[Mapping[str, float]]) -> None:
        self._series: dict[str, list[tuple[dict[str, str], float]]] = {}
        for text, value in (item for page in pages for item in page.items()):
            name, _, labels = text.partition("{")
            self._series.setdefault(name, []).append((dict(_LABELS.findall(labels)), value))

    def values(self, name: str, **labels: str) -> list[float]:
        """Return the values of the series of this name that have these labels."""
        found = self._series.get(name, ())
        return [value for own, value in found if labels.items() <= own.items()]

    def total(self, name: str, **labels: str) -> float:
        """Return their sum; 0 if there is none: a counter appears with its first count."""
        return sum(self.values(name, **labels))


@dataclass(frozen=True)
class Ratio:
    """A group's ratio now, what one instance of each role can do, and the advice."""

    scenario: str
    group: str
    prefills: int
    decodes: int
    prefill_per_s: float | None
    """Requests per second of a prefill that is never idle; None: unknown."""
    decode_per_s: float | None
    """Requests per second of a decode whose slots are all used; None: unknown."""
    advice: Advice

    def row(self) -> dict[str, Any]:
        return asdict(self)


def ratios(deployment: config.Deployment, samples: Sequence[Sample]) -> list[Ratio]:
    """Return the ratio of every group, from at least two samples of one window."""
    return [
        _ratio(deployment, scenario, group, samples)
        for scenario in deployment.served
        for group in scenario.groups
    ]


def _ratio(
    deployment: config.Deployment,
    scenario: config.Scenario,
    group: config.Group,
    samples: Sequence[Sample],
) -> Ratio:
    prefill_work, decode_work = _prefilled(samples, group.prefill), _decoded(samples, group.decode)
    waiting, of = "pdserve_waiting_requests", {"group": group.name}
    waiting_decode = sum(one.total(waiting, role="decode", **of) for one in samples) / len(samples)
    leased = sum(
        one.total("pdserve_kv_leases", instance=name, state="leased")
        for one in samples
        for name in group.prefill
    )
    seen = Observation(
        prefills=len(group.prefill),
        decodes=len(group.decode),
        decode_slots=deployment.decode.slots,
        prefill_work=prefill_work,
        decode_work=decode_work,
        waiting=sum(one.total(waiting, role="prefill", **of) for one in samples) / len(samples),
        leased=waiting_decode + leased / len(samples),
        oldest_s=max(samples[-1].values("pdserve_oldest_waiting_seconds", **of), default=0.0),
        limit_s=(scenario.ttft_limit_ms or deployment.gateway.ttft_limit_ms) / 1e3,
    )
    return Ratio(
        scenario=scenario.name,
        group=group.name,
        prefills=seen.prefills,
        decodes=seen.decodes,
        prefill_per_s=prefill_rate(prefill_work),
        decode_per_s=decode_rate(decode_work, seen.decode_slots),
        advice=advise(seen),
    )


def _prefilled(samples: Sequence[Sample], names: Sequence[str]) -> Work:
    counters = {"completed": "pdserve_prefill_seconds_count"}
    return _work(samples, names, COMMON | counters)


def _decoded(samples: Sequence[Sample], names: Sequence[str]) -> Work:
    local_s = "pdserve_local_prefill_seconds_sum"
    work = _work(samples, names, COMMON | DECODES)
    local = _work(samples, names, {"busy_s": local_s})
    return replace(work, busy_s=max(0.0, work.busy_s - local.busy_s))


def _work(samples: Sequence[Sample], names: Sequence[str], counters: Mapping[str, str]) -> Work:
    """Return what instances did between the first and the last sample.

    A counter that has become smaller belongs to an instance that was restarted: what it did between
    these two samples is left out.
    """
    found = Work()
    for name, (before, after) in itertools.product(names, itertools.pairwise(samples)):
        grown = {
            field: after.total(counter, instance=name) - before.total(counter, instance=name)
            for field, counter in counters.items()
        }
        if min(grown.values()) >= 0:
            found += Work(**grown)
    return found


def table(found: Sequence[Ratio]) -> Table:
    """Return a table with a row for each group."""
    made = Table("group", "now", "a prefill", "a decode", "best", "why")
    for one in found:
        made.add_row(
            one.group,
            f"{one.prefills}:{one.decodes}",
            _per_s(one.prefill_per_s),
            _per_s(one.decode_per_s),
            f"{one.advice.prefills}:{one.advice.decodes}",
            one.advice.reason,
        )
    return made


def _per_s(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}/s"
