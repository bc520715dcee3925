"""Live through every trial with many seeds: python -m tests.control_model --seeds 0:200."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor

from tests.control_model.faults import FAULTS
from tests.control_model.outcomes import Outcome
from tests.control_model.regret import regrets
from tests.control_model.trials import TRIALS

EVERY = TRIALS | FAULTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.control_model", description=__doc__)
    parser.add_argument("--seeds", default="0:200", metavar="FIRST:LAST")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trial", choices=EVERY, action="append", help="only these")
    parser.add_argument("--regret", action="store_true", help="against a clairvoyant, instead")
    args = parser.parse_args()
    first, last = map(int, args.seeds.split(":"))
    began = time.perf_counter()
    with ProcessPoolExecutor(args.jobs) as pool:
        if args.regret:
            regrets(pool, range(first, last))
            broken = False
        else:
            broken = trials(pool, args.trial or list(EVERY), range(first, last))
    print(f"{time.perf_counter() - began:.0f} s")
    return int(broken)


def trials(pool: ProcessPoolExecutor, names: list[str], seeds: range) -> bool:
    """Live through trials, and print a line for each kind of outcome."""
    jobs = [(name, seed) for name in names for seed in seeds]
    found: dict[str, list[Outcome]] = {}
    for (name, seed), one in zip(jobs, pool.map(_one, jobs, chunksize=4), strict=True):
        if isinstance(one, str):
            print(f"{name}, seed {seed}: {one}", flush=True)
            found.setdefault(name, []).append(Outcome(name, seed, 0, 0, 1, 0, 0, [one]))
            continue
        for text in one.broken:
            print(f"{name}, seed {seed}: {text}", flush=True)
        found.setdefault(one.trial, []).append(one)
    print(
        f"{'trial':24} seeds  SLO %: mean  worst  changes/h: mean  most  reversals/h  failed broken"
    )
    for name, ones in sorted(found.items()):
        print(
            f"{name:24} {len(ones):5}  {statistics.mean(one.slo for one in ones):11.1f}"
            f"  {min(one.slo for one in ones):5.1f}"
            f"  {statistics.mean(one.changes / one.hours for one in ones):15.2f}"
            f"  {max(one.changes / one.hours for one in ones):4.1f}"
            f"  {statistics.mean(one.reversals / one.hours for one in ones):11.2f}"
            f"  {sum(one.failed for one in ones):6} {sum(bool(one.broken) for one in ones):6}"
        )
    return any(one.broken for ones in found.values() for one in ones)


def _one(job: tuple[str, int]) -> Outcome | str:
    name, seed = job
    try:
        return EVERY[name](seed)
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    sys.exit(main())
