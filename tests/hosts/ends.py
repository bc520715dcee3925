"""``python -m tests.hosts.ends sender | puller``: one end of the transfer plane, over NIXL.

Reads one command a line, as `End.say` writes it, and answers each with one line.
"""

from __future__ import annotations

import hashlib
import select
import subprocess
import sys
import threading
import time

from pdserve.errors import PDServeError
from pdserve.kvcache.layout import KVLayout
from tests.hosts.network import Network
from tests.unit import transfers

LAYOUT = KVLayout(4, 8, 128, "float32")
TOKENS = 2048
NBYTES = LAYOUT.bytes_per_token * TOKENS
"""64 MiB: 0.56 s at 1 Gbit/s."""
TICK_S = 0.1


class End:
    """A process of this module on a host."""

    def __init__(self, network: Network, host: str, role: str) -> None:
        self.process = subprocess.Popen(
            network.command(host, [sys.executable, "-m", "tests.hosts.ends", role]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, *command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(command) + "\n")
        self.process.stdin.flush()

    def read(self, within: float) -> str:
        """Return the next answer; fail if it does not come."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], within)[0], "no answer"
        return self.process.stdout.readline().strip()

    def say(self, *command: str, within: float = 10.0) -> str:
        self.write(*command)
        return self.read(within)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Sender:
    """A prefill without an engine, which sweeps its leases like one with an engine."""

    def __init__(self) -> None:
        self._sender = transfers.Sender("nixl", transfers.terms(LAYOUT), NBYTES)
        self._lock = threading.Lock()
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        while True:
            with self._lock:
                self._sender.tick()
            time.sleep(TICK_S)

    def describe(self) -> str:
        return self._sender.holder.endpoint.hex()

    def offer(self) -> str:
        """Return a handle, and the digest of its KV cache."""
        with self._lock:
            made = self._sender.offer(TOKENS)
        return f"{made.sealed.hex()} {made.digest}"

    def held(self) -> str:
        """Return what is not available to others."""
        with self._lock:
            return str(self._sender.held())

    def close(self) -> None:
        self._sender.close()


class Puller:
    """A decode without an engine."""

    def __init__(self) -> None:
        agreed = transfers.terms(LAYOUT)
        self._puller = transfers.Puller("nixl", agreed, TOKENS, timeout_s=20.0, piece_bytes=4 << 20)

    def connect(self, endpoint: str) -> str:
        """Connect; return the transport of the link."""
        return self._puller.receiver.connect(bytes.fromhex(endpoint))[1].detail

    def pull(self, sealed: str) -> str:
        """Pull; return the digest of what has arrived."""
        self._puller.pull(bytes.fromhex(sealed))
        return hashlib.sha256(self._puller.pool).hexdigest()

    def close(self) -> None:
        self._puller.close()


def main(role: str) -> None:
    end = Sender() if role == "sender" else Puller()
    for line in sys.stdin:
        what, *arguments = line.split()
        try:
            said = getattr(end, what)(*arguments)
        except PDServeError as error:
            said = f"{type(error).__name__}: {error}"
        print(said, flush=True)
    end.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
