"""The watchdogs of servers: each a process of its own, ``python -m pdctl.watch FOLDER``.

In the server's folder are ``watch`` (its process id; locked as long as it runs), ``watch.json``
(its report) and ``watch.log``. It works even if none of them can be written, since its environment
names its server, too. A watchdog may be killed at any moment: the server continues, and the next
watchdog needs nothing from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pdctl import footprint, locks
from pdctl.errors import ServerError

END_S = 5.0
BEGIN_S = 60.0
"""Seconds for a new one to begin: it imports much, and the machine may be busy."""
BEGUN = "PDCTL_BEGUN"
"""Environment variable with the descriptor through which it reports that it has begun."""
MARK = "PDCTL_WATCHES"
"""Environment variable with the folder, and the token of the server's start."""


def start(folder: Path, *, held: bool) -> Callable[[], None]:
    """Start the watchdog of a server's folder; do nothing if there is one.

    Args:
        held: show its log here, too.

    Returns:
        A function that waits until it has begun, and raises ServerError if it does not.

    Raises:
        ServerError: it cannot be started.
    """
    try:
        lock = locks.opened(folder / "watch")
    except OSError as error:
        raise ServerError(f"no watchdog: {error.filename}: {error.strerror}") from error
    try:
        while pid(folder) is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another command only asks, or was faster
            return _started(folder, lock, held)
    finally:
        os.close(lock)
    return lambda: None


def _started(folder: Path, lock: int, held: bool) -> Callable[[], None]:
    begun, told = os.pipe()
    try:
        # The lock belongs to the open file, and so to the child from now on.
        child = subprocess.Popen(
            [sys.executable, "-m", "pdctl.watch", str(folder)],
            env={**os.environ, MARK: _mark(folder), BEGUN: str(told)},
            stdin=subprocess.DEVNULL,
            stdout=None if held else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            pass_fds=[lock, told],
            start_new_session=True,  # Ctrl-C is handled by pdctl, which then ends it
        )
    finally:
        os.close(told)
    with contextlib.suppress(OSError):  # its mark also identifies it, though more slowly
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(child.pid).encode(), 0)

    def wait() -> None:
        with os.fdopen(begun, "rb") as file:
            ready, _, _ = select.select([file], [], [], BEGIN_S)
            if not ready or not file.read(1):
                how = "has ended at once" if ready else f"has not begun within {BEGIN_S:g} s"
                raise ServerError(
                    f"the watchdog of {folder.name} (process {child.pid}) {how}: see "
                    f"{folder / 'watch.log'}"
                )

    return wait


def begun() -> None:
    """Report that the watchdog has begun; called by the watchdog."""
    # Children of the watchdog are no watchdogs; its own environment stays visible to others.
    os.environ.pop(MARK, None)
    told = os.environ.pop(BEGUN, None)
    if told is not None:
        with contextlib.suppress(OSError):  # no command waits for it any more
            os.write(int(told), b".")
            os.close(int(told))


def end(folder: Path) -> None:
    """End the watchdog of a folder and wait for its end. Raises: ServerError: it does not end."""
    deadline = time.monotonic() + END_S
    while found := _all(folder):
        if time.monotonic() > deadline:
            numbers = ", ".join(str(process.pid) for process in found)
            raise ServerError(f"the watchdog of {folder.name} (process {numbers}) does not end")
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)


def _all(folder: Path) -> list[psutil.Process]:
    """Return those that hold the lock of a folder, and those that watch it without the lock."""
    found = _marked(folder)
    with contextlib.suppress(psutil.NoSuchProcess):
        if (locked := pid(folder)) is not None and locked not in {one.pid for one in found}:
            found.append(psutil.Process(locked))
    return found


def pid(folder: Path) -> int | None:
    """Return the process that watches the server of a folder; None: there is none.

    Raises:
        ServerError: one is being started, and does not begin in time.
    """
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        try:
            with (folder / "watch").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                found = psutil.Process(int((folder / "watch").read_text()))
                if found.environ().get(MARK) == _mark(folder):
                    return found.pid
            # It is just being started, or its number could not be written.
            if marked := _marked(folder):
                return marked[0].pid
            time.sleep(0.001)
    raise ServerError(f"{folder / 'watch'}: locked by an unknown process")


def watched(folder: Path) -> bool:
    """Tell whether the server of a folder has a watchdog, or is about to have one."""
    try:
        return pid(folder) is not None
    except ServerError:
        return True


def report(folder: Path, state: dict[str, Any]) -> None:
    """Write the watchdog's report; called by the watchdog. Raises: OSError."""
    new = folder / "watch.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode({"pid": os.getpid(), **state})))
    new.replace(folder / "watch.json")


def reported(folder: Path) -> dict[str, Any] | None:
    """Return the report of a running watchdog with its ``pid``; None: there is none yet."""
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


def _mark(folder: Path) -> str:
    return f"{folder}:{footprint.token(folder)}"


def _marked(folder: Path) -> list[psutil.Process]:
    """Return every process that watches the latest start of the server of a folder."""
    return footprint.carrying(MARK, [_mark(folder)])
