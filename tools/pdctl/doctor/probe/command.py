"""Runs a command with a bound on its time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 10.0
"""Seconds; nvidia-smi takes some where the driver has to wake the GPUs first."""


class Unknown(Exception):
    """Something cannot be found out; the message says why."""


def answer(*command: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return what it prints.

    Raises:
        Unknown: it is not installed, fails, or does not end in time.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Unknown(f"{name} has not answered in {TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise Unknown(f"{name}: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        how = said[-1] if said else f"exit status {done.returncode}"
        raise Unknown(f"{name}: {how}")
    return done.stdout
