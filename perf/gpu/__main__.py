"""The GPU suite: `python -m perf.gpu test|bench [--part NAME ...]`.

Each part runs in a process of its own, with a limit of time, and writes gpu-NAME.json; gpu.md is a
table of all. A part that has been done lately is not run again. Without a GPU the same parts run on
the CPU, in smaller sizes, and their results go to .cache/gpu-suite.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pdctl.paths import ROOT
from pdserve.transfer.protocol import Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import load
from perf.gpu import report
from perf.gpu.outcome import finished, keep
from perf.gpu.parts import PARTS
from perf.gpu.scale import CPU, GPU, SMALLEST, Scale
from perf.record import RESULTS

SCRATCH = ROOT / ".cache" / "gpu-suite"
END_S = 20.0
Kind = Literal["test", "bench"]


def chosen(smallest: bool) -> tuple[Scale, str]:
    """Return the scale for this machine, and why it has no GPU; empty: it has one."""
    try:
        load()
    except Unreachable as error:
        return (SMALLEST if smallest else CPU), str(error)
    return GPU, ""


def run(part: str, scale: Scale, folder: Path, kind: Kind, limit_s: float) -> bool:
    """Run one part in a process group of its own; return whether all of it is right."""
    command = [sys.executable, "-u", "-m", "perf.gpu.one", part, scale.name, str(folder), kind]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit_s)
        if status not in (0, 1):
            report.broken(part, folder, f"its process ended with {status}")
        return status == 0
    except subprocess.TimeoutExpired:
        report.broken(part, folder, f"it was ended after {limit_s:g} s")
        return False
    finally:
        # Its servers end with it, whatever ends it.
        for how in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, how)
                try:
                    process.wait(END_S)
                except subprocess.TimeoutExpired:
                    continue


def _arguments() -> argparse.Namespace:
    """Return the arguments; argparse, since typer needs more than the suite's archives hold."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("kind", choices=("test", "bench"), help="what is right, or how fast it is")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="may be repeated")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--out", type=Path, help="folder of the results; see docs/gpu.md")
    parser.add_argument("--smallest", action="store_true", help="without a GPU: the sizes of CI")
    return parser.parse_args()


def main() -> int:
    """Run the parts that check something, or those that measure; return 1 if one has failed."""
    asked = _arguments()
    kind: Kind = asked.kind
    scale, lacking = chosen(asked.smallest)
    usual = SCRATCH if lacking else Path(os.environ.get("OUT") or RESULTS)
    folder: Path = asked.out or usual
    folder.mkdir(parents=True, exist_ok=True)
    wanted = asked.part or [
        name for name, one in PARTS.items() if (one.checks if kind == "test" else one.measures)
    ]
    failed = []
    for name in wanted:
        found = [one for one in (folder, SCRATCH) if finished(name, scale.name, kind, one)]
        if found and not asked.again:
            keep(name, found[0], folder)
            print(f"{name}: done already; --again runs it again", flush=True)
            continue
        began = time.monotonic()
        print(f"{name}: {PARTS[name].about} ...", flush=True)
        right = run(name, scale, folder, kind, PARTS[name].limit_s)
        taken = time.monotonic() - began
        print(f"{name}: {'right' if right else 'FAILED'}, {taken:.0f} s", flush=True)
        if right:
            keep(name, folder, SCRATCH)
        else:
            failed.append(name)
        report.write(folder, wanted)
    print(report.write(folder, wanted))
    if lacking:
        print(f"Not shown, for there is no GPU ({lacking}): CUDA IPC, engines on a GPU, its rates.")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
