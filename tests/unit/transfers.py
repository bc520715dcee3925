"""Shared parts of the tests of the transfer plane: two ends, in one process or in two."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from pdserve.kvcache.arena import State
from pdserve.kvcache.handle import KVHandle, seal, unseal
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding, columns
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.lease.region import SHM
from pdserve.transfer.producer.holder import Holder
from pdserve.transfer.producer.lease_manager import LeasedRange, LeaseManager
from pdserve.transfer.protocol import Transport, Unreachable
from pdserve.transfer.transports.shm import ShmTransport
from tests.unit.memcpy import MemcpyTransport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pdserve.transfer.consumer.cost_model import Strategy
    from pdserve.transfer.reports import TransferReport

KEY = b"k" * 32
MODEL = "tiny"
LAYOUT = KVLayout(3, 2, 8, "float32")
TOKENS = 50
ROWS = 128
"""Rows of a receiver's pool."""
# No test waits longer than this for a thread or a process.
LIMIT_S = 10.0

opened: list[Sender | Puller] = []
"""Objects that a test has opened, which are closed after it in any case."""
WAYS = ("shm", "nixl", "nixl over tcp")
"""Ways that `pick` knows; NIXL uses CMA where it may."""


def pick(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prepare for a way, and return its transport's name; skip the test if it is not available."""
    name = way.split(maxsplit=1)[0]
    if name == "nixl":
        try:
            from pdserve.transfer.transports.nixl.agent import _library

            _library()
        except (ImportError, Unreachable) as error:
            pytest.skip(f"no NIXL here: {error}")
        if way.endswith("tcp"):
            monkeypatch.setenv("UCX_TLS", "tcp")
            monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return name


def transport(name: str) -> Transport:
    if name == "shm":
        return ShmTransport()
    if name == "memcpy":
        return MemcpyTransport()
    from pdserve.transfer.transports.nixl.transport import NixlTransport

    return NixlTransport()


def terms(layout: KVLayout = LAYOUT, sharding: Sharding = Sharding(), key: bytes = KEY) -> Terms:  # noqa: B008
    return Terms(MODEL, layout, key, sharding)


@dataclass(slots=True, eq=False)
class Offer:
    """A KV cache that is leased."""

    leased: LeasedRange
    sealed: bytes
    whole: NDArray[np.uint8]
    """The content, or what it will be: [planes, tokens, row_bytes]; no byte is zero."""
    parts: NDArray[np.uint8]
    """Its place in memory: [parts, planes, tokens, bytes of a part's row]."""

    @property
    def slot(self) -> int:
        assert self.leased.slot is not None
        return self.leased.slot

    @property
    def state(self) -> State:
        return self.leased.range.state

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.whole).hexdigest()


class Sender:
    """A prefill without an engine: KV caches are random bytes, and the caller sets the clock."""

    def __init__(
        self,
        name: str = "shm",
        agreed: Terms | None = None,
        data_bytes: int = 1 << 20,
        slots: int = 4,
        instance: str = "prefill",
    ) -> None:
        self.terms = agreed or terms()
        self.rng = np.random.default_rng(0)
        region = f"pdserve-test-{secrets.token_hex(6)}"
        self.holder = Holder(instance, region, data_bytes, slots, self.terms, [transport(name)])
        self.leases = self.holder.leases
        self.lease_manager = LeaseManager(self.holder, lambda freed: None)
        self.leased: list[Offer] = []
        opened.append(self)

    def _allocate(self, tokens: int) -> Offer:
        """Allocate a KV cache that is not leased yet, and of which nothing has been computed."""
        layout, sharding = self.terms.layout, self.terms.sharding
        leased = self.lease_manager.allocate(sharding.nbytes(layout, tokens))
        assert leased is not None, "no room"
        held = leased.range
        data = self.holder.data[held.offset : held.offset + held.nbytes]
        data[:] = 0
        whole = self.rng.integers(1, 256, layout.shape(tokens), np.uint8)
        parts = data.reshape(sharding.parts, layout.planes, tokens, -1)
        self.leased.append(Offer(leased, b"", whole, parts))
        return self.leased[-1]

    def begin(self, tokens: int = TOKENS, until: float | None = None) -> Offer:
        """Lease a KV cache of which nothing has been computed yet."""
        offer = self._allocate(tokens)
        until = time.monotonic() + 60 if until is None else until
        offer.sealed = self.lease_manager.grant(offer.leased, tokens, until)
        return offer

    def compute(self, offer: Offer, planes: int) -> None:
        """Complete the first `planes` planes."""
        self._write(offer, planes)
        self.lease_manager.fill(offer.leased, planes)

    def _write(self, offer: Offer, planes: int) -> None:
        layout, sharding = self.terms.layout, self.terms.sharding
        for part in range(sharding.parts):
            offer.parts[part][:planes] = offer.whole[:planes, :, columns(sharding, layout, part)]

    def offer(self, tokens: int = TOKENS, until: float | None = None) -> Offer:
        """Lease a complete KV cache."""
        until = time.monotonic() + 60 if until is None else until
        offer, planes = self._allocate(tokens), self.terms.layout.planes
        self._write(offer, planes)
        offer.sealed = self.lease_manager.complete(offer.leased, tokens, planes, 7, until)
        return offer

    def end(self, offer: Offer, now: float) -> None:
        """End an unwanted lease: cancelled, rejected by the decode, or failed."""
        self.leased.remove(offer)
        self.lease_manager.give_back(offer.leased, now)

    def tick(self, now: float | None = None) -> None:
        """Sweep the leases, whatever the load."""
        now = time.monotonic() if now is None else now
        for offer in list(self.leased):
            if offer.leased.range.filled and self.lease_manager.over(offer.leased, now):
                self.end(offer, now)
        self.lease_manager.sweep(now)

    def held(self) -> dict[str, int]:
        """Return the memory that is not available to others, as far as it is not zero."""
        counts = {
            state.value: size
            for state, (_, size) in self.lease_manager.counts().items()
            if state not in (State.FREE, State.CACHED)
        }
        counts |= {"leases": len(self.leases), "waited for": len(self.lease_manager.quarantined)}
        return {what: count for what, count in counts.items() if count}

    def forge(self, offer: Offer, **fields: object) -> bytes:
        """Return another handle of an offer's lease, sealed with the deployment's own key."""
        handle = unseal(offer.sealed, KVHandle, self.terms.key)
        return seal(msgspec.structs.replace(handle, **fields), self.terms.key)

    def close(self) -> None:
        opened.remove(self)
        self.holder.close()


class Puller:
    """A decode without an engine: a receiver and its pool, which is zero where nothing arrived."""

    def __init__(
        self,
        name: str = "shm",
        agreed: Terms | None = None,
        rows: int = ROWS,
        ranks: int = 1,
        strategy: Strategy | None = None,
        timeout_s: float = LIMIT_S,
        piece_bytes: int = 1 << 16,
    ) -> None:
        agreed = agreed or terms()
        layout = agreed.layout
        self.pool = np.zeros((layout.planes, rows, layout.row_bytes), np.uint8)
        self.staging = Staging(np.ones((2, piece_bytes), np.uint8))
        self.transport = transport(name)
        self.receiver = Receiver(
            agreed,
            [self.transport],
            self.pool,
            self.staging,
            ranks=ranks,
            strategy=strategy,
            timeout_s=timeout_s,
        )
        opened.append(self)

    def connect(self, sender: Sender) -> None:
        self.receiver.connect(sender.holder.endpoint)

    def pull(
        self, offer: Offer | bytes, runs: Sequence[tuple[int, int]] | None = None, first: int = 0
    ) -> TransferReport:
        handle = self.receiver.open(offer if isinstance(offer, bytes) else offer.sealed)
        return self.receiver.pull(handle, runs or [(0, handle.tokens - first)], first)

    def check(self, offer: Offer, runs: Sequence[tuple[int, int]], first: int = 0) -> None:
        """Check that the KV cache is in the runs, and that the rest of the pool is zero."""
        rows = [row for start, count in runs for row in range(start, start + count)]
        assert (self.pool[:, rows] == offer.whole[:, first:]).all()
        assert not np.delete(self.pool, rows, axis=1).any()

    def close(self) -> None:
        opened.remove(self)
        self.receiver.close()


class Gate(list[tuple[int, int]]):
    """Runs of a pool at which a pull stops, after it has written PULLING, until `opened` is set."""

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        super().__init__(runs)
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.reached.set()
        assert self.opened.wait(LIMIT_S), "the gate was not opened in time"
        return super().__iter__()


class MidPull:
    """A pull that is paused: it has written PULLING, and copied nothing yet."""

    def __init__(self, receiver: Receiver, handle: KVHandle, first_row: int = 0) -> None:
        self._gate = Gate([(first_row, handle.tokens)])
        self._result: TransferReport | BaseException | None = None
        self._thread = threading.Thread(target=self._pull, args=(receiver, handle), daemon=True)
        self._thread.start()
        if not self._gate.reached.wait(LIMIT_S):
            raise AssertionError(f"the pull has not begun: {self._result}")

    def _pull(self, receiver: Receiver, handle: KVHandle) -> None:
        try:
            self._result = receiver.pull(handle, self._gate)
        except BaseException as error:
            self._result = error
            self._gate.reached.set()

    def end(self) -> TransferReport:
        """Let it run to its end; return its result or raise its error."""
        self._gate.opened.set()
        self._thread.join(LIMIT_S)
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result


class Process:
    """A script in a separate process, which answers each line with a line."""

    def __init__(self, script: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> str:
        self.write(line)
        return self.read()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it; a second call is no error."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()


# Answers `connect HEX`, `pull HEX` and `halt HEX`; `halt` pauses in the middle of the pull until it
# reads one more line.
_RECEIVER = """
import hashlib, sys
from pdserve.errors import PDServeError
from tests.unit import transfers

puller = transfers.Puller(sys.argv[1])
class Halt(list):
    def __iter__(self):
        print("pulling", flush=True)
        sys.stdin.readline()
        return super().__iter__()

for line in sys.stdin:
    what, data = line.split()
    data = bytes.fromhex(data)
    try:
        if what == "connect":
            print("connected", puller.receiver.connect(data)[1].detail, flush=True)
            continue
        handle = puller.receiver.open(data)
        runs = [(0, handle.tokens)]
        puller.receiver.pull(handle, Halt(runs) if what == "halt" else runs)
        arrived = puller.pool[:, : handle.tokens].tobytes()
        print(hashlib.sha256(arrived).hexdigest(), flush=True)
    except PDServeError as error:
        print(type(error).__name__, error, flush=True)
puller.close()
"""


class Child(Process):
    """A receiver in a separate process."""

    def __init__(self, name: str = "shm") -> None:
        super().__init__(_RECEIVER, name)

    def connect(self, sender: Sender) -> str:
        """Connect; return the transport of the link."""
        said = self.say(f"connect {sender.holder.endpoint.hex()}")
        assert said.startswith("connected"), said
        return said.removeprefix("connected").strip()

    def pull(self, sealed: bytes) -> str:
        """Return the digest of what has arrived, or why nothing is valid."""
        return self.say(f"pull {sealed.hex()}")

    def begin(self, sealed: bytes) -> str:
        """Begin a pull and pause in the middle of it; return 'pulling', or why not."""
        return self.say(f"halt {sealed.hex()}")

    def end(self) -> str:
        """Let the pull of `begin` run to its end; return the same as `pull`."""
        return self.say("")


_HOLDER = """
import sys
from tests.unit import transfers

sender = transfers.Sender(sys.argv[1], data_bytes=int(sys.argv[2]))
print(sender.holder.region.name, sender.holder.endpoint.hex(), flush=True)
for line in sys.stdin:
    offer = sender.offer(int(line))
    print(offer.digest, offer.sealed.hex(), flush=True)
sender.close()
"""


class Prefill(Process):
    """A holder in a separate process."""

    def __init__(self, name: str = "shm", data_bytes: int = 1 << 20) -> None:
        super().__init__(_HOLDER, name, data_bytes)
        self.region, endpoint = self.read().split()
        self.endpoint = bytes.fromhex(endpoint)

    def offer(self, tokens: int) -> tuple[str, bytes]:
        """Return the digest of a KV cache, and its handle."""
        digest, sealed = self.say(str(tokens)).split()
        return digest, bytes.fromhex(sealed)

    def kill(self) -> None:
        super().kill()
        (SHM / self.region).unlink(missing_ok=True)  # as pdctl does
