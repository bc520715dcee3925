"""The controller of this host: a process of its own, ``python -m pdctl.controller FOLDER``.

Its folder, ``control-ID`` beside the servers' folders, has ``deployment.yaml`` (the copy that it
reads, which a reload replaces), ``controller`` (its process id; locked as long as it runs),
``controller.log``, and the store, if that is a file. It may be killed at any moment: the servers go
on, and the next one needs nothing from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil

from pdctl import locks, private
from pdctl.errors import ServerError
from pdctl.paths import RUN
from pdserve.config import Deployment
from pdserve.control import stores

BEGIN_S = 60.0
"""Seconds for a new one to begin: it imports much, and the machine may be busy."""
END_S = 5.0
"""Seconds for one to end by itself."""
BEGUN = "PDCTL_BEGUN"
"""Environment variable with the descriptor through which it reports that it has begun."""
HELD = "PDCTL_HELD"
"""Environment variable that is set if it ends with its standard input."""


def folder(deployment: Deployment, run: Path = RUN) -> Path:
    """Return the folder of a deployment with a section ``control``."""
    assert deployment.control is not None
    return stores.folder(deployment.control, run.resolve())


def give(deployment: Deployment, run: Path = RUN) -> Path:
    """Give a controller its deployment; returns the folder. Raises: OSError."""
    place = folder(deployment, run)
    private.folder(place.parent)
    private.folder(place)
    new = place / "deployment.new"
    private.write(new, msgspec.yaml.encode(deployment))
    new.replace(place / "deployment.yaml")
    return place


def start(deployment: Deployment, *, held: bool, run: Path = RUN) -> None:
    """Start the controller of this host and wait until it has begun, unless there is one.

    Args:
        held: it ends with this process, and shows its log here, too.

    Raises:
        ServerError: it does not begin.
    """
    place = folder(deployment, run)
    if pid(place) is None:
        place = give(deployment, run)
    lock = locks.opened(place / "controller")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # there is one, or another command has just started it
        return
    else:
        _started(place, lock, held)
    finally:
        os.close(lock)


def _started(place: Path, lock: int, held: bool) -> None:
    begun, told = os.pipe()
    try:
        # The lock belongs to the open file, and so to the child from now on.
        child = subprocess.Popen(
            [sys.executable, "-m", "pdctl.controller", str(place)],
            env={**os.environ, BEGUN: str(told)} | ({HELD: "1"} if held else {}),
            stdin=subprocess.PIPE if held else subprocess.DEVNULL,
            stdout=None if held else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            pass_fds=[lock, told],
            start_new_session=True,  # Ctrl-C is handled by pdctl, which then ends it
        )
    finally:
        os.close(told)
    if child.stdin is not None:  # it stays open as long as this process runs, however that ends
        os.dup(child.stdin.fileno())
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(child.pid).encode(), 0)
    with os.fdopen(begun, "rb") as file:
        ready, _, _ = select.select([file], [], [], BEGIN_S)
        if not ready or not file.read(1):
            how = "has ended at once" if ready else f"has not begun within {BEGIN_S:g} s"
            raise ServerError(
                f"the controller (process {child.pid}) {how}: see {place / 'controller.log'}"
            )


def begun() -> None:
    """Report that the controller has begun; called by the controller."""
    told = os.environ.pop(BEGUN, None)
    if told is not None:
        with contextlib.suppress(OSError):  # no command waits for it any more
            os.write(int(told), b".")
            os.close(int(told))


def pid(place: Path) -> int | None:
    """Return the process of the controller with this folder; None: there is none."""
    try:
        with (place / "controller").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            return int((place / "controller").read_text())
        return 0  # it is just being started


def end(place: Path) -> bool:
    """End the controller with this folder and wait for its end; tell whether there was one.

    Raises:
        ServerError: it does not end.
    """
    deadline = time.monotonic() + 2 * END_S
    found = False
    while (number := pid(place)) is not None:
        found = True
        if time.monotonic() > deadline:
            raise ServerError(f"the controller (process {number}) of {place} does not end")
        kill = time.monotonic() > deadline - END_S
        if number:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(number).send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        time.sleep(0.05)
    return found
