"""The watchdogs of servers: each a process of its own, ``python -m pdctl.watch FOLDER``.

In the server's folder lie ``watch`` (its process id; locked as long as it runs), ``watch.json``
(what it knows) and ``watch.log``. A watchdog may be killed at any moment: the server goes on, and
the next watchdog finds everything as it must be.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from pdctl.errors import ServerError

END_S = 5.0


def start(folder: Path, *, held: bool) -> None:
    """Look after the server of a folder from now on; nothing to do if somebody does.

    Args:
        held: show what it says here, too.
    """
    with (folder / "watch").open("a+") as file:
        while pid(folder) is None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody only asks, or was faster
            file.truncate(0)
            # The lock is the open file's, and so the child's from now on.
            child = subprocess.Popen(
                [sys.executable, "-m", "pdctl.watch", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=None if held else subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                pass_fds=[file.fileno()],
                start_new_session=True,  # Ctrl-C is for pdctl, which then ends it
            )
            file.write(str(child.pid))
            return


def end(folder: Path) -> None:
    """End the watchdog of a folder and wait until it has. Raises: ServerError: it does not."""
    deadline = time.monotonic() + END_S
    while (found := pid(folder)) is not None:
        if time.monotonic() > deadline:
            raise ServerError(f"the watchdog of {folder.name} (process {found}) does not end")
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)
        time.sleep(0.01)


def pid(folder: Path) -> int | None:
    """The process that looks after the server of a folder; None: nobody does.

    Raises:
        ServerError: one is being started, and does not come.
    """
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        try:
            with (folder / "watch").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            if text := (folder / "watch").read_text():
                return int(text)
            time.sleep(0.001)  # it is being started at this moment
        else:
            return None
    raise ServerError(f"{folder / 'watch'}: locked, by nobody that is known")


def announce(folder: Path) -> None:
    """Called by a watchdog that has been started."""
    (folder / "watch").write_text(str(os.getpid()))


def report(folder: Path, state: dict[str, Any]) -> None:
    """Called by a watchdog: leave what it knows to whoever asks."""
    new = folder / "watch.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode({"pid": os.getpid(), **state})))
    new.replace(folder / "watch.json")


def reported(folder: Path) -> dict[str, Any] | None:
    """What a running watchdog knows, its ``pid`` included; None: there is none, or it begins."""
    found = pid(folder)
    try:
        state: dict[str, Any] = msgspec.json.decode((folder / "watch.json").read_bytes())
    except FileNotFoundError:
        return None
    return state if state["pid"] == found else None
