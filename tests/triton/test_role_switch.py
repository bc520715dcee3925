"""Tests for instances that change roles under load, on real servers with two gateways."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from perf.role_switch import site
from perf.role_switch.__main__ import Result, measure
from perf.role_switch.site import Engine, Site

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.alone]

SLOW = 5.0
"""Times a bound of `perf.role_switch`, on a machine that does other work too."""


def measured(engine: Engine, folder: Path, switches: int, instances: int = 4) -> Result:
    wanted = site.deployment(engine, instances, 2, folder, fixed=False)
    with Site.of(wanted, folder) as made:
        return asyncio.run(measure(engine, made, switches, 0))


def check(found: Result, switches: int) -> None:
    assert len(found.switches) == switches, found.not_switched
    assert found.requests > 10 * switches
    missed = {
        one.what: one.measured
        for one in found.budgets()
        if one.limit is not None and one.measured > one.limit * (SLOW if one.unit == "s" else 1)
    }
    assert not missed, found.errors


def test_switches_under_load(tmp_path: Path) -> None:
    check(measured("emulated", tmp_path, switches=4), switches=4)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["emulated", "torch"])
def test_fifty_switches_under_load(engine: Engine, tmp_path: Path) -> None:
    check(measured(engine, tmp_path, switches=50, instances=8), switches=50)
