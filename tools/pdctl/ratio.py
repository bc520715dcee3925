"""The ratio of prefills and decodes that each group should have, from its servers' metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pdserve import config
from pdserve.control.assignment import FIRST, Role
from pdserve.control.cluster import Counters, Line, Load
from pdserve.control.ratio import Advice, advise
from pdserve.control.window import WINDOW_S, Window, observation, take
from pdserve.control.work import Work, decode_rate, prefill_rate

SAMPLES = 13
"""Number of samples in a window: as many ticks as the controller's have, and one."""
COMMON = {"busy_s": "pdserve_busy_seconds_total", "slot_s": "pdserve_slot_seconds_total"}
"""Counters of both roles, by the fields of ``Work``."""
PREFILLS = {"completed": "pdserve_prefill_seconds_count"}
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
    roles: dict[str, Role] = dict.fromkeys(group.prefill, "prefill")
    roles |= dict.fromkeys(group.decode, "decode")
    window = Window()
    for at, one in enumerate(samples):
        # The ticks are all of one length, whatever it is: they only have to fit in a window.
        load = _load(one, group, at * WINDOW_S / len(samples))
        window = take(window, load, roles, cold=(), keep=True)
    limit_s = (scenario.ttft_limit_ms or deployment.gateway.ttft_limit_ms) / 1e3
    slots = deployment.decode.slots
    seen = observation(window, len(group.prefill), len(group.decode), slots, limit_s)
    return Ratio(
        scenario=scenario.name,
        group=group.name,
        prefills=seen.prefills,
        decodes=seen.decodes,
        prefill_per_s=prefill_rate(seen.prefill_work),
        decode_per_s=decode_rate(seen.decode_work, slots),
        advice=advise(seen),
    )


def _load(sample: Sample, group: config.Group, at: float) -> Load:
    """Return what a sample says of a group."""
    counters: dict[str, Counters | None] = {}
    for names, extra in ((group.prefill, PREFILLS), (group.decode, DECODES)):
        for name in names:
            found = {
                field: sample.total(series, instance=name)
                for field, series in (COMMON | extra).items()
            }
            # What a decode computed for prompts of its own is no work of a decode.
            local_s = sample.total("pdserve_local_prefill_seconds_sum", instance=name)
            work = Work(**found | {"busy_s": max(0.0, found["busy_s"] - local_s)})
            leased = sample.total("pdserve_kv_leases", instance=name, state="leased")
            counters[name] = Counters(FIRST, work, leased)
    of = {"group": group.name}
    line = Line(
        waiting=sample.total("pdserve_waiting_requests", role="prefill", **of),
        waiting_decode=sample.total("pdserve_waiting_requests", role="decode", **of),
        oldest_s=max(sample.values("pdserve_oldest_waiting_seconds", **of), default=0.0),
        routed=sample.total("pdserve_routed_requests_total", **of),
    )
    return Load(at, counters, {"": line})


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
