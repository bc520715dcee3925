"""A few seeds of every trial; `make control-model` lives through 200 of each."""

from __future__ import annotations

import pytest

from tests.control_model.faults import FAULTS
from tests.control_model.regret import acted, foreseen, load_of
from tests.control_model.trials import TRIALS

LONG = ("day",)
"""Trials that one seed of `make control-model` needs most of its time for."""
REGRET = 5.0
"""Points that a controller may lose against one that knows the traffic."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in TRIALS]
)
def test_loads(name: str) -> None:
    assert TRIALS[name](1).broken == []


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    assert FAULTS[name](2).broken == []


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 20))
@pytest.mark.parametrize("name", [*TRIALS, *FAULTS])
def test_more_seeds(name: str, seed: int) -> None:
    assert (TRIALS | FAULTS)[name](seed).broken == []


@pytest.mark.parametrize(
    ("minutes", "switch_s"),
    [
        (60, 5.0),
        *(
            pytest.param(minutes, switch_s, marks=pytest.mark.full)
            for minutes in (20, 60)
            for switch_s in (1.0, 20.0)
        ),
    ],
)
def test_regret_on_the_tide(minutes: int, switch_s: float) -> None:
    load = load_of(minutes)
    slo, changes, _ = acted(load, 1, switch_s)
    assert foreseen(load, 1, switch_s) - slo <= REGRET
    assert changes > 0
