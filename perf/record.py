"""Results as files: the command, the machine, and the results."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pdctl.doctor.probe.command import Unknown
from pdctl.doctor.probe.gpus import gpus
from pdctl.paths import ROOT

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("grpcio", "msgspec", "numpy", "tokenizers", "torch", "tritonclient")


class Record:
    """One run of one measurement; make it when the run begins."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """Begin the record of a run; ``name`` is that of its file in ``folder``.

        Args:
            folder: None: ``perf/results``.
        """
        self._name = name
        self._folder = folder or RESULTS
        self._load = os.getloadavg()
        self._began = time.time()

    def write(self, results: Any) -> Path:
        """Write the results, anything that msgspec can encode, in place of the previous run's."""
        document = {
            "command": _command(),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began)),
            "seconds": round(time.time() - self._began),
            "load_average_before": [round(value, 2) for value in self._load],
            "load_average_after": [round(value, 2) for value in os.getloadavg()],
            "machine": _machine(),
            "versions": _versions(),
            "results": results,
        }
        path = self._folder / f"{self._name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")
        return path


def _command() -> str:
    """Return the command as it was typed, without absolute paths of this machine."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec else Path(sys.argv[0]).stem
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return f"python -m {module} {shlex.join(given)}".strip()


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        **_gpus(),
    }


def _gpus() -> dict[str, Any]:
    """Return the GPUs and their driver; nothing on a machine without any."""
    try:
        found = gpus(Path("/"))
    except Unknown as error:
        return {"gpus": f"unknown: {error}"}
    if not found:
        return {}
    names = [f"{one.name}, {one.memory_mib} MiB" for one in found]
    return {"gpus": names, "driver": found[0].driver}


def _commit() -> str:
    """Return the commit of this checkout; empty: it is a copy without its history, or no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    return {
        "pdserve": _commit() or "not committed",
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
