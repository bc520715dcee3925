"""Which servers of a run folder are watched, each by a task of the agent; see agents.py.

In a server's folder are ``watch`` (there as long as the server is to be watched; locked by the
agent as long as it watches it), ``watch.json`` (the report of its watchdog) and ``watch.log``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pdctl import agents, footprint, locks
from pdctl import started as records
from pdctl.agents import END_S
from pdctl.errors import ServerError
from pdserve.node import epoch

BEGIN_S = 60.0
"""Seconds for a watchdog to begin: the agent imports much, and the machine may be busy."""
STARTS = 3
"""Number of agents that are started for it: one may be about to end, since it had nothing to do."""
LOOK_S = 0.01


def start(folder: Path) -> Callable[[], None]:
    """Have the server of a folder watched; do nothing if it is.

    Returns:
        A function that waits until it is watched, and raises ServerError if that does not happen.

    Raises:
        ServerError: there is no agent, and none can be started.
    """
    try:
        os.close(locks.opened(folder / "watch"))
    except OSError as error:
        raise ServerError(f"no watchdog: {error.filename}: {error.strerror}") from error
    return partial(_wait, folder, agents.start(folder.parent))


def _wait(folder: Path, child: int | None) -> None:
    run = folder.parent
    starts = 1 if child is not None else 0
    deadline = time.monotonic() + BEGIN_S
    while not _locked(folder / "watch"):
        if agents.pid(run) is None and not _locked(folder / "watch"):
            if starts == STARTS:
                raise ServerError(
                    f"the watchdog of {folder.name} (process {child}) has ended at once: see "
                    f"{run / 'agent.log'}"
                )
            child = agents.start(run) or child
            starts += 1
        if time.monotonic() > deadline:
            raise ServerError(
                f"the watchdog of {folder.name} has not begun within {BEGIN_S:g} s: see "
                f"{folder / 'watch.log'}"
            )
        time.sleep(LOOK_S)


def end(folder: Path) -> None:
    """Have the server of a folder watched no more, and wait until it is not.

    An agent that does not let go of it is killed, and another one is started for its other servers.
    An agent that has nothing else to watch has ended afterwards, too.

    Raises:
        ServerError: the agent does not end.
    """
    run, leaving = folder.parent, folder / "watch.leaving"
    try:
        (folder / "watch").replace(leaving)
    except FileNotFoundError:
        pass  # or somebody else has done so, and it is being left
    except OSError:  # then it cannot be asked
        agents.end(run)
        return
    if not _until(lambda: not _locked(leaving)):
        agents.end(run)
        if any(wanted(run)):
            agents.start(run)
    leaving.unlink(missing_ok=True)
    if not _until(lambda: any(wanted(run)) or not _leaves(run)):
        agents.end(run)


def _leaves(run: Path) -> bool:
    """Tell whether there is an agent that ends as soon as it has nothing to watch."""
    return any(map(agents.leaves, agents.every(run)))


def wanted(run: Path, but: Collection[Path] = ()) -> Iterator[Path]:
    """Yield the folder of each server of a run folder that is to be watched.

    Whether it runs is for its watchdog to see; but a server that was started before the machine was
    is started by a command, or never.

    Args:
        but: folders that are left out.
    """
    for file in run.glob("*/watch"):
        folder = file.parent
        if folder not in but and footprint.token(folder) is not None:
            started = records.noted(folder)
            if started is not None and started.boot == epoch.boot():
                yield folder


class Hold:
    """Says, as long as an agent watches a server, whether it is still to be watched."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file = file
        self._number = os.fstat(descriptor).st_ino

    def wanted(self) -> bool:
        try:
            return self._file.stat().st_ino == self._number
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Hold | None]:
    """Lock a server for the agent that watches it; None: somebody else has locked it."""
    file = folder / "watch"
    descriptor = os.open(file, os.O_RDONLY)
    hold = None
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hold = Hold(file, descriptor)
        yield hold
    finally:
        os.close(descriptor)


def pid(folder: Path) -> int | None:
    """Return the agent that watches the server of a folder; None: it is not watched.

    Raises:
        ServerError: it is watched by an unknown process.
    """
    deadline = time.monotonic() + END_S
    while _locked(folder / "watch"):
        if (found := agents.pid(folder.parent)) is not None:
            return found
        if without_lock := agents.every(folder.parent):
            return without_lock[0].pid
        if time.monotonic() > deadline:
            raise ServerError(f"{folder / 'watch'}: locked by an unknown process")
        time.sleep(LOOK_S)
    return None


def watched(folder: Path) -> bool:
    """Tell whether the server of a folder is watched, or about to be."""
    try:
        about_to_be = (folder / "watch").exists() and agents.pid(folder.parent) is not None
    except ServerError:
        return True
    return about_to_be or _locked(folder / "watch")


def _locked(file: Path) -> bool:
    """Tell whether an agent has locked a file of a server's folder."""
    with contextlib.suppress(FileNotFoundError), file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _until(done: Callable[[], bool]) -> bool:
    """Wait for it, END_S at most; return whether it is so."""
    deadline = time.monotonic() + END_S
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def report(folder: Path, state: dict[str, Any]) -> None:
    """Write the report of a server's watchdog; called by the agent. Raises: OSError."""
    new = folder / "watch.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode({"pid": os.getpid(), **state})))
    new.replace(folder / "watch.json")


def reported(folder: Path) -> dict[str, Any] | None:
    """Return the report of a running watchdog with its agent's ``pid``; None: there is none yet."""
    found = pid(folder)
    try:
        state: dict[str, Any] = msgspec.json.decode((folder / "watch.json").read_bytes())
    except OSError:
        return None
    return state if state["pid"] == found else None


def repairing(folder: Path) -> str:
    """Return what the watchdog of a folder repairs, with the reason of each; empty: nothing."""
    with contextlib.suppress(ServerError):
        things = (reported(folder) or {}).get("things", {})
        return "; ".join(
            f"{thing}: {health['reason']}"
            for thing, health in things.items()
            if health["state"] in ("failed", "repairing")
        )
    return ""
