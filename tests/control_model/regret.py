"""Regret: how much less is within the SLO than a clairvoyant has, at the same cost of a switch."""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor

from tests.control_model import shapes
from tests.control_model.agents import Times
from tests.control_model.clairvoyant import LEADS_S, foresee, policy
from tests.control_model.requests import Load
from tests.control_model.runs import go, make

SWITCHES_S = (1.0, 5.0, 20.0)
PERIODS_MIN = (10, 20, 30, 60)


def load_of(minutes: int) -> Load:
    """Return the tide between the mixes A and B of this period, for one hour."""
    return shapes.tide(60.0 * minutes, 3600.0)


def acted(load: Load, seed: int, switch_s: float) -> tuple[float, int, int]:
    """Return the controller's SLO in percent, its changes, and its reversals."""
    times = Times(switch_s=switch_s)
    run = go(make(load, load.mix(0).best(load.instances), seed, times=times), load)
    return run.result.slo, len(run.changes), run.reversals()


def foreseen(load: Load, seed: int, switch_s: float) -> float:
    """Return the SLO of the best clairvoyant."""
    found = []
    for lead_s in LEADS_S:
        times = Times(switch_s=switch_s)
        run = make(load, load.mix(0).best(load.instances), seed, times=times)
        run.controller.policy = policy(run.controller.policy)
        foresee(run, load, lead_s)
        found.append(go(run, load).result.slo)
    return max(found)


def fixed(load: Load, seed: int, prefills: int) -> float:
    """Return the SLO of a ratio that stays."""
    return go(make(load, prefills, seed), load, act=False).result.slo


def _one(job: tuple[int, float, int]) -> tuple[float, float, int, int, list[float]]:
    minutes, switch_s, seed = job
    load = load_of(minutes)
    slo, changes, reversals = acted(load, seed, switch_s)
    still = [fixed(load, seed, n) for n in (4, 5, 6, 7, 8)]
    return slo, foreseen(load, seed, switch_s), changes, reversals, still


def regrets(pool: ProcessPoolExecutor, seeds: range) -> None:
    """Print the regret of each period and switch."""
    print(
        "minutes  switch s  SLO %  clairvoyant  regret: mean  most  best fixed  changes/h"
        "  reversals/h"
    )
    cases = [(minutes, switch_s) for minutes in PERIODS_MIN for switch_s in SWITCHES_S]
    jobs = [(*case, seed) for case in cases for seed in seeds]
    results = dict(zip(jobs, pool.map(_one, jobs), strict=True))
    for minutes, switch_s in cases:
        ones = [results[minutes, switch_s, seed] for seed in seeds]
        regret = [known - slo for slo, known, *_ in ones]
        best = max(statistics.mean(one[4][n] for one in ones) for n in range(5))
        print(
            f"{minutes:7}  {switch_s:8.0f}  {statistics.mean(one[0] for one in ones):5.1f}"
            f"  {statistics.mean(one[1] for one in ones):11.1f}  {statistics.mean(regret):12.2f}"
            f"  {max(regret):4.1f}  {best:10.1f}  {statistics.mean(one[2] for one in ones):9.1f}"
            f"  {statistics.mean(one[3] for one in ones):11.2f}",
            flush=True,
        )
