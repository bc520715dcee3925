"""Tests for `pdctl ratio`: the advice that follows from the metrics of a group under load."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from pdctl.ratio import SAMPLES, Ratio, Sample, ratios, table
from pdserve import config
from pdserve.control.ratio import best, throughput
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

SLOTS, TOKENS = 16, 50
PREFILL_S, STEP_S, STEP_S_EACH = 0.2, 0.010, 0.001
PROFILE = {
    "prefill": {"base_ms": PREFILL_S * 1e3},
    "decode": {"base_ms": STEP_S * 1e3, "per_sequence_ms": STEP_S_EACH * 1e3},
}
PREFILL_RATE = 1 / PREFILL_S
DECODE_RATE = SLOTS / ((TOKENS - 1) * (STEP_S + SLOTS * STEP_S_EACH))
"""Answers per second of a decode with a full batch; the first token is the prefill's."""
WINDOW_S = 30.0


def deployment(prefills: int, decodes: int) -> config.Deployment:
    server = config.Server(
        name="local",
        prefill=tuple(f"prefill_{number}" for number in range(prefills)),
        decode=tuple(f"decode_{number}" for number in range(decodes)),
    )
    return config.Deployment(model="model", servers=(server,), decode=config.Decode(slots=SLOTS))


class Page:
    """A page of metrics that grows with a site's registry."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._series: dict[str, float] = {}

    def sample(self) -> Sample:
        self._site.scheduler.show("gateway", "default")
        for change in self._site.metrics.drain():
            labels = ",".join(f'{name}="{value}"' for name, value in change.labels)
            series = f"{change.name}{{{labels}}}"
            before = self._series.get(series, 0.0) if change.kind == "counter" else 0.0
            self._series[series] = before + change.value
        return Sample([dict(self._series)])


async def under_load(site: Site, load: float) -> list[Sample]:
    """Put this share of the group's throughput on it for a window; return the samples."""
    most = throughput(site.prefills, site.decodes, PREFILL_RATE, DECODE_RATE)
    page, samples, answers = Page(site), [], []
    until = asyncio.get_running_loop().time()

    async def arrive() -> None:
        while True:
            await asyncio.sleep(site.rng.expovariate(load * most))
            answers.append(site.start(site.request(max_tokens=TOKENS)))

    arriving = asyncio.create_task(arrive())
    for _ in range(SAMPLES):
        await asyncio.sleep(WINDOW_S / (SAMPLES - 1))
        samples.append(page.sample())
    arriving.cancel()
    assert asyncio.get_running_loop().time() >= until + WINDOW_S
    await asyncio.gather(*answers)
    return samples


async def measured(tmp_path: Path, prefills: int, decodes: int, load: float) -> Ratio:
    async with Site(
        tmp_path,
        prefills=prefills,
        decodes=decodes,
        profile=PROFILE,
        prefill={"slots": 4, "batch": 1},
        decode={"slots": SLOTS, "blocks": 1024},
        gateway={"local": "off"},
    ) as site:
        [found] = ratios(deployment(prefills, decodes), await under_load(site, load))
        return found


@virtual
@pytest.mark.parametrize("load", [0.4, 0.9])
async def test_the_best_ratio_is_found_at_any_load(load: float, tmp_path: Path) -> None:
    """With fewer requests batches are smaller, and a decode is faster than with a full batch."""
    found = await measured(tmp_path, 4, 2, load)
    assert found.prefill_per_s == pytest.approx(PREFILL_RATE, rel=0.02)
    assert found.decode_per_s == pytest.approx(DECODE_RATE, rel=0.15)
    wanted = best(4, 2, PREFILL_RATE, DECODE_RATE)
    assert (found.advice.prefills, found.advice.decodes) == (wanted, 6 - wanted)


@virtual
async def test_a_lack_of_prefills_is_seen(tmp_path: Path) -> None:
    found = await measured(tmp_path, 2, 6, 0.9)
    wanted = best(2, 6, PREFILL_RATE, DECODE_RATE)
    assert wanted > 2
    assert (found.advice.prefills, found.advice.decodes) == (wanted, 8 - wanted)
    assert "more requests per second" in found.advice.reason


@virtual
async def test_an_idle_group_is_left_as_it_is(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=4, decodes=2, profile=PROFILE) as site:
        page = Page(site)
        [found] = ratios(deployment(4, 2), [page.sample(), page.sample()])
    assert found.prefill_per_s is found.decode_per_s is None
    assert (found.advice.prefills, found.advice.decodes) == (4, 2)
    console = Console(width=120, record=True)
    console.print(table([found]))
    assert "the prefills have completed 0 requests" in console.export_text()


def sample(**values: float) -> Sample:
    counters = {
        "pdserve_prefill_seconds_count": values["completed"],
        "pdserve_busy_seconds_total": values["busy"],
        "pdserve_slot_seconds_total": values["slot"],
    }
    return Sample([{f'{name}{{instance="prefill_0"}}': value for name, value in counters.items()}])


def test_a_stretch_in_which_an_instance_was_restarted_is_left_out() -> None:
    """Its counters begin at 0 again."""
    samples = [sample(completed=100 * n, busy=20 * n, slot=30 * n) for n in (5, 6, 0, 1)]
    [found] = ratios(deployment(1, 1), samples)
    assert found.prefill_per_s == pytest.approx(5.0)
