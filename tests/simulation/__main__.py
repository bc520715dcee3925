"""Run one seed of the simulated core and show it, or run many: docs/simulation.md."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from async_solipsism import ResolutionWarning

from tests.simulation import plan
from tests.simulation.mechanisms import MECHANISMS, without
from tests.simulation.shrink import shrink
from tests.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="live through this one")
    parser.add_argument("--trace", action="store_true", help="with every event of it")
    parser.add_argument("--shrink", action="store_true", help="and with no more than breaks it")
    parser.add_argument("--seeds", default="0:100", metavar="FIRST:LAST", help="or through these")
    parser.add_argument("--jobs", type=int, default=1, help="processes that do so")
    parser.add_argument("--without", choices=MECHANISMS, help="switch a mechanism off")
    args = parser.parse_args()
    if args.seed is not None:
        return one(args.seed, args.trace, args.shrink, args.without)
    first, last = map(int, args.seeds.split(":"))
    return many(range(first, last), args.jobs, args.without)


def one(seed: int, trace: bool, smaller: bool, mechanism: str | None) -> int:
    """Print a seed's plan, its events if they are wanted, and what it has broken."""
    _be_quiet()
    with without(mechanism):
        drawn = shrink(plan.draw(seed)) if smaller else plan.draw(seed)
        print(replace(drawn, requests=()))
        print(f"{len(drawn.requests)} requests", *drawn.faults, sep="\n")
        events: list[str] = []
        said = _broken(drawn, events if trace else None)
    print(*events, sep="\n")
    print(said or "nothing is broken")
    return bool(said)


def many(seeds: range, jobs: int, mechanism: str | None) -> int:
    """Print what each seed has broken, and how long all of them have taken."""
    began, broken, spent = time.perf_counter(), 0, 0.0
    with ProcessPoolExecutor(jobs) as pool:
        for seed, said, seconds in pool.map(partial(_seed, mechanism), seeds, chunksize=8):
            spent += seconds
            if said:
                broken += 1
                print(f"seed {seed}: {said}", flush=True)
    took = time.perf_counter() - began
    print(f"{len(seeds)} seeds, {broken} broken; {took:.1f} s, {spent:.1f} s of them computing")
    return bool(broken)


def _seed(mechanism: str | None, seed: int) -> tuple[int, str, float]:
    _be_quiet()
    began = time.process_time()
    with without(mechanism):
        said = _broken(plan.draw(seed), None)
    return seed, said, time.process_time() - began


def _broken(drawn: plan.Plan, events: list[str] | None) -> str:
    try:
        simulate(drawn, events)
    except AssertionError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    return ""


def _be_quiet() -> None:
    """Silence the warnings of the code under test: the faults of a plan cause them."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", ResolutionWarning)


if __name__ == "__main__":
    sys.exit(main())
