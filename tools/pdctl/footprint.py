"""The processes and shared memory of a server on this machine, marked with its token.

The token is random for each start and inherited in the environment, so that it identifies the
processes of one server, whatever their ids are or have been.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import time
from collections.abc import Collection
from pathlib import Path

import psutil

from pdctl.triton import EXIT_TIMEOUT_S

VARIABLE = "PDSERVE_SHM_PREFIX"
SHM = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
_TOKEN = re.compile(r"pdserve-[a-z][a-z0-9-]{0,63}-[0-9a-f]{12}")


def new_token(server: str) -> str:
    return f"pdserve-{server.replace('_', '-')}-{secrets.token_hex(6)}"


def is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


def token(folder: Path) -> str | None:
    """Return the token of the latest start of the server with this folder; see server.py."""
    with contextlib.suppress(OSError):
        text = (folder / "token").read_text()
        if is_token(text):
            return text
    return None


def processes(tokens: Collection[str]) -> list[psutil.Process]:
    """Return every process that carries one of the tokens, without zombies."""
    return carrying(VARIABLE, tokens)


def carrying(variable: str, values: Collection[str]) -> list[psutil.Process]:
    """Return every process whose environment has a variable with one of some values."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) in values:
                found.append(process)
        except psutil.Error:  # ended, a zombie, or another user's
            continue
    return found


def server_process(token: str) -> psutil.Process | None:
    """Return the ``tritonserver`` of a token; None: it does not run."""
    for process in processes([token]):
        try:
            if process.name() == "tritonserver":
                return process
        except psutil.Error:
            continue
    return None


def environment(token: str) -> dict[str, str]:
    """Return the environment with which the server of a token was started; empty: it has ended."""
    process = server_process(token)
    with contextlib.suppress(psutil.Error):
        return {} if process is None else process.environ()
    return {}


def regions(token: str) -> list[Path]:
    """Return the shared memory of a server, Triton's own and that of its models."""
    return sorted(SHM.glob(f"{token}-*"))


def narrow(token: str) -> None:
    """Restrict the shared memory of a server to its user.

    Triton makes its regions with mode 0644, whatever the umask. The models of this project narrow
    theirs before they are READY (pdserve.triton.stub); this is for all others.
    """
    for region in regions(token) if is_token(token) else ():
        with contextlib.suppress(FileNotFoundError):
            region.chmod(0o600)


def erase(tokens: Collection[str], grace_s: float = EXIT_TIMEOUT_S + 3) -> None:
    """End the servers of the tokens and remove what they left, within ``grace_s`` + 5 s.

    Triton is told to end, and waited for; after that, all remaining processes are killed. If
    ``grace_s`` is 0 they are killed at once.
    """
    assert all(map(is_token, tokens))
    leaders = [leader for leader in map(server_process, tokens) if leader is not None]
    if leaders and grace_s:
        _signal(leaders, signal.SIGINT)
        _wait_dead(leaders, grace_s)
        _wait_dead(processes(tokens), 0.5)  # stubs notice the end by themselves
    for _ in range(5):
        remaining = processes(tokens)
        if not remaining:
            break
        _signal(remaining, signal.SIGKILL)
        _wait_dead(remaining, 1)
    for token in tokens:
        for region in regions(token):
            region.unlink(missing_ok=True)


def is_dead(process: psutil.Process) -> bool:
    """Tell whether it has ended; a zombie has, too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_dead(processes: list[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(map(is_dead, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _signal(targets: list[psutil.Process], number: signal.Signals) -> None:
    for process in targets:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
