"""Runs a command with a bound on its time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 10.0
"""Seconds; nvidia-smi takes some where the driver has to wake the GPUs first."""


class Unknown(Exception):
    """Something cannot be found out; the message says why."""


class Failed(Unknown):
    """A command has ended with an error, or by a signal."""


def answer(
    *command: str,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float | None = None,
) -> str:
    """Return what it prints.

    Args:
        timeout_s: seconds that it may take; None: TIMEOUT_S.

    Raises:
        Failed: it ends with an error.
        Unknown: it is not installed, or does not end in time.
    """
    within_s = TIMEOUT_S if timeout_s is None else timeout_s
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
            timeout=within_s,
        )
    except subprocess.TimeoutExpired as error:
        raise Unknown(f"{name} has not answered in {within_s:.0f} s") from error
    except OSError as error:
        raise Unknown(f"{name}: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        how = said[-1] if said else f"exit status {done.returncode}"
        if done.returncode < 0:  # what it has printed need not say so
            how = f"ended by signal {-done.returncode}, {signal.strsignal(-done.returncode)}"
        raise Failed(f"{name}: {how}")
    return done.stdout
