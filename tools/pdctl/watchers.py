"""The watchdogs of servers: each a process of its own, ``python -m pdctl.watch FOLDER``.

In the server's folder lie ``watch`` (its process id; locked as long as it runs), ``watch.json``
(what it knows) and ``watch.log``. None of them has to be written for it to work: its environment
says whose it is, too. A watchdog may be killed at any moment: the server goes on, and the next
watchdog finds everything as it must be.
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
"""For a new one to begin: it has much to import, and the machine may be busy."""
BEGUN = "PDCTL_BEGUN"
"""Of its environment: the descriptor through which it says that it has begun."""
MARK = "PDCTL_WATCHES"
"""Of its environment: the folder, and the token of the server's start."""


def start(folder: Path, *, held: bool) -> Callable[[], None]:
    """Look after the server of a folder from now on; nothing to do if somebody does.

    Args:
        held: show what it says here, too.

    Returns:
        What waits until it has begun, and raises ServerError if it does not.

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
                continue  # somebody only asks, or was faster
            return _started(folder, lock, held)
    finally:
        os.close(lock)
    return lambda: None


def _started(folder: Path, lock: int, held: bool) -> Callable[[], None]:
    begun, told = os.pipe()
    try:
        # The lock is the open file's, and so the child's from now on.
        child = subprocess.Popen(
            [sys.executable, "-m", "pdctl.watch", str(folder)],
            env={**os.environ, MARK: _mark(folder), BEGUN: str(told)},
            stdin=subprocess.DEVNULL,
            stdout=None if held else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            pass_fds=[lock, told],
            start_new_session=True,  # Ctrl-C is for pdctl, which then ends it
        )
    finally:
        os.close(told)
    with contextlib.suppress(OSError):  # its mark tells as well, if more slowly
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
    """Called by a watchdog that looks after its server from now on."""
    # What it starts itself is no watchdog; its own environment stays as others see it.
    os.environ.pop(MARK, None)
    told = os.environ.pop(BEGUN, None)
    if told is not None:
        with contextlib.suppress(OSError):  # nobody waits for it any more
            os.write(int(told), b".")
            os.close(int(told))


def end(folder: Path) -> None:
    """End the watchdog of a folder and wait until it has. Raises: ServerError: it does not."""
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
    """Those that hold the lock of a folder, and those that do not though they look after it."""
    found = _marked(folder)
    with contextlib.suppress(psutil.NoSuchProcess):
        if (locked := pid(folder)) is not None and locked not in {one.pid for one in found}:
            found.append(psutil.Process(locked))
    return found


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
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                found = psutil.Process(int((folder / "watch").read_text()))
                if found.environ().get(MARK) == _mark(folder):
                    return found.pid
            # It is being started at this moment, or its number could not be written.
            if marked := _marked(folder):
                return marked[0].pid
            time.sleep(0.001)
    raise ServerError(f"{folder / 'watch'}: locked, by nobody that is known")


def watched(folder: Path) -> bool:
    """Somebody looks after the server of a folder, or is just beginning to."""
    try:
        return pid(folder) is not None
    except ServerError:
        return True


def report(folder: Path, state: dict[str, Any]) -> None:
    """Called by a watchdog: leave what it knows to whoever asks. Raises: OSError."""
    new = folder / "watch.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode({"pid": os.getpid(), **state})))
    new.replace(folder / "watch.json")


def reported(folder: Path) -> dict[str, Any] | None:
    """What a running watchdog knows, its ``pid`` included; None: there is none, or it begins."""
    found = pid(folder)
    try:
        state: dict[str, Any] = msgspec.json.decode((folder / "watch.json").read_bytes())
    except OSError:
        return None
    return state if state["pid"] == found else None


def _mark(folder: Path) -> str:
    return f"{folder}:{footprint.token(folder)}"


def _marked(folder: Path) -> list[psutil.Process]:
    """Every process that looks after the latest start of the server of a folder."""
    return footprint.carrying(MARK, [_mark(folder)])
