"""The node agent of a run folder, as a process: ``python -m pdctl.agent RUN``, one at most.

In the run folder are ``agent.lock`` (its process id; locked as long as it runs) and ``agent.log``.
It works even if neither can be written, since its environment names the run folder, too. It may be
killed at any moment: its servers continue, and the next agent needs nothing from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import psutil

from pdctl import footprint, locks, private
from pdctl.errors import ServerError

END_S = 5.0
"""Seconds in which an agent ends, or does what it is asked to; after that it is killed."""
MARK = "PDCTL_AGENT"
"""Environment variable with the run folder; an agent without it was not started by pdctl."""


def start(run: Path) -> int | None:
    """Start the agent of a run folder; do nothing if there is one.

    Returns:
        Its process id, if it was started here.

    Raises:
        ServerError: it cannot be started.
    """
    try:
        lock = locks.opened(_lock(run))
    except OSError as error:
        raise ServerError(f"no watchdog: {error.filename}: {error.strerror}") from error
    try:
        while pid(run) is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another command only asks, or was faster
            return _started(run, lock)
    finally:
        os.close(lock)
    return None


def _started(run: Path, lock: int) -> int:
    with _log(run) as log:
        # The lock belongs to the open file, and so to the child from now on.
        child = subprocess.Popen(
            [sys.executable, "-m", "pdctl.agent", str(run), str(lock)],
            env={**os.environ, MARK: str(run)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C is handled by pdctl
        )
    write(lock, child.pid)
    return child.pid


def write(lock: int, number: int) -> None:
    """Write the process id of the agent that holds the lock."""
    with contextlib.suppress(OSError):  # its mark also identifies it, though more slowly
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(number).encode(), 0)


def _log(run: Path) -> BinaryIO:
    try:
        return private.opened(run / "agent.log")
    except OSError:  # an agent without a log is better than none
        return Path(os.devnull).open("wb")


def locked(run: Path) -> int:
    """Lock a run folder for this process, which is its agent from now on; return the descriptor.

    Raises:
        ServerError: it has an agent.
        OSError: there is no such folder.
    """
    lock = locks.opened(_lock(run))
    deadline = time.monotonic() + END_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # by an agent, or for a moment by a command that asks
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(lock)
            raise ServerError(f"{run} has an agent already (process {pid(run)})") from None
        write(lock, os.getpid())
        return lock


def pid(run: Path) -> int | None:
    """Return the process that holds the lock of a run folder; None: it has no agent.

    Raises:
        ServerError: one is being started, and does not begin in time.
    """
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        try:
            with _lock(run).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                found = psutil.Process(int(_lock(run).read_text()))
                if "pdctl.agent" in found.cmdline():
                    return found.pid
            # It is just being started, or its number could not be written.
            if marked := _marked(run):
                return marked[0].pid
            time.sleep(0.001)
    raise ServerError(f"{_lock(run)}: locked by an unknown process")


def every(run: Path) -> list[psutil.Process]:
    """Return the process that holds the lock of a run folder, and agents of it without the lock."""
    found = _marked(run)
    with contextlib.suppress(psutil.NoSuchProcess):
        if (holder := pid(run)) is not None and holder not in {one.pid for one in found}:
            found.append(psutil.Process(holder))
    return found


def leaves(process: psutil.Process) -> bool:
    """Tell whether an agent ends as soon as it has nothing to watch."""
    try:
        return MARK in process.environ()
    except psutil.Error:
        return False


def end(run: Path) -> None:
    """Kill the agents of a run folder, and wait for their end.

    Raises:
        ServerError: one does not end.
    """
    deadline = time.monotonic() + END_S
    while found := every(run):
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in found)
            raise ServerError(f"the agent of {run} (process {numbers}) does not end")
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


def _marked(run: Path) -> list[psutil.Process]:
    return footprint.carrying(MARK, [str(run)])


def _lock(run: Path) -> Path:
    # The name of no server has a dot.
    return run / "agent.lock"
