"""The GPU suite: `python -m perf.gpu test|bench [--part NAME ...]`.

Each part runs in a process of its own, with a limit of time, and writes gpu-NAME.json; gpu.md is a
table of all. A part that has been done lately is not run again. Without a GPU the same parts run on
the CPU, in smaller sizes, and their results go to .cache/gpu-suite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from pdctl.paths import ROOT
from pdserve.transfer.protocol import Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import load
from perf.gpu import report
from perf.gpu.outcome import finished
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
        return process.wait(limit_s) == 0
    except subprocess.TimeoutExpired:
        report.late(part, folder, limit_s)
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


def main(
    kind: Annotated[str, typer.Argument(help="test: what is right or wrong; bench: measurements")],
    part: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    again: Annotated[bool, typer.Option("--again", help="run parts that are done, too")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the results; see docs/gpu.md")] = None,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="without a GPU: sizes of CI")
    ] = False,
) -> None:
    """Run the parts that check something, or those that measure; ends with 1 if one has failed."""
    if kind not in ("test", "bench"):
        raise typer.BadParameter(f"{kind}; there are test and bench")
    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(PARTS)}")
    scale, lacking = chosen(smallest)
    folder = out or (Path(os.environ.get("OUT") or RESULTS) if not lacking else SCRATCH)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        name
        for name, one in PARTS.items()
        if (name in part if part else (one.checks if kind == "test" else one.measures))
    ]
    failed = []
    for name in wanted:
        if not again and finished(name, scale.name, kind, folder):
            print(f"{name}: done already; --again runs it again", flush=True)
            continue
        began = time.monotonic()
        print(f"{name}: {PARTS[name].about} ...", flush=True)
        right = run(name, scale, folder, kind, PARTS[name].limit_s)  # type: ignore[arg-type]
        print(f"{name}: {'right' if right else 'FAILED'}, {time.monotonic() - began:.0f} s")
        if not right:
            failed.append(name)
        report.write(folder, wanted)
    print(report.write(folder, wanted))
    if lacking:
        print(f"Not shown, for there is no GPU ({lacking}): CUDA IPC, GPU engines, their rates.")
    if failed:
        print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
