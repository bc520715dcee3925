"""Processes at the other end of the `nixl` transport."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pdserve.transfer.lease import region
from pdserve.transfer.lease.region import SharedRegion

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
DATA = 64 * MIB
SLOTS = 8
# No test waits longer than this for another process.
LIMIT_S = 10.0

HOLDER = f"""
import secrets, sys, threading, time
import numpy as np
from pdserve.transfer.transports.nixl.transport import NixlTransport
from pdserve.transfer.protocol import Memory
from pdserve.transfer.lease.region import SharedRegion

held = SharedRegion.create(sys.argv[1], {DATA}, {SLOTS}, bytes(8))
held.data[:] = np.random.default_rng(0).integers(0, 256, {DATA}, np.uint8)
transport = NixlTransport()
data = Memory(held.data.ctypes.data, held.data.nbytes, held)
print(transport.offer(Memory.of(held.table), data).hex(), flush=True)
closing = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), closing.set())).start()
while not closing.wait(50e-6):
    transport.progress()
transport.close()
print("closed", flush=True)
"""

# Stops in the middle of its first pull, then pulls all of the data again and again.
RECEIVER = f"""
import os, signal, sys, time
import numpy as np
from pdserve.transfer.transports.nixl.transport import NixlTransport
from pdserve.transfer.protocol import Memory, TransferError

arrival = np.ones({DATA}, np.uint8)
transport = NixlTransport()
transport.register(Memory.of(arrival))
span = np.array([[0, arrival.ctypes.data, arrival.nbytes]], np.int64)
pending = transport.open(bytes.fromhex(sys.argv[1])).pull(span, time.monotonic() + 0.5)
os.kill(os.getpid(), signal.SIGSTOP)
try:
    pending.wait()
    print("arrived", flush=True)
except TransferError as error:
    print("failed:", error, flush=True)
link = transport.open(bytes.fromhex(sys.argv[1]))
print("pulling", flush=True)
while True:
    link.pull(span, time.monotonic() + 60).wait()
"""


class Process:
    """A second process, which reads and writes lines."""

    def __init__(self, script: str, argument: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.pid = self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], LIMIT_S)[0], (
            "the process has written no line"
        )
        return self.process.stdout.readline().decode().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Holder(Process):
    """A holder of random bytes, which this process has mapped."""

    def __init__(self) -> None:
        name = f"pdserve-test-{secrets.token_hex(6)}"
        self.path = region.SHM / name
        super().__init__(HOLDER, name)
        try:
            self.way = bytes.fromhex(self.line())
            self.region = SharedRegion.open(name)
        except BaseException:
            self.end()
            raise

    def close(self) -> str:
        """Close it; return what it prints at its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.line()

    def end(self) -> None:
        super().end()
        self.path.unlink(missing_ok=True)
