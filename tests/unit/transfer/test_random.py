"""Thousands of transfers with random faults: no wrong byte is ever accepted, and nothing leaks.

A holder offers KV caches of random bytes from an arena so small that every range is reused soon.
Several receivers pull them at once: threads over an in-process link, or processes over shared
memory. Meanwhile leases are cancelled or expire, receivers come late, die, or stop, links break,
and the holder is restarted.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pdserve.errors import HandleError, PDServeError
from pdserve.kvcache.arena import State
from pdserve.transfer.consumer.peers import NoLink
from pdserve.transfer.lease import remote
from pdserve.transfer.lease.remote import RemoteLease
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.producer import lease_manager
from tests.unit.memcpy import MemcpyTransport
from tests.unit.transfers import LAYOUT, Offer, Process, Puller, Sender

ARENA = 112 << 10
MAX_TOKENS = 60
WORKERS = 3
IN_FLIGHT = 3
KILLS = 3
# Short, so that a range that is given up is soon reused.
BEAT_S, QUIET_S, LEASE_S = 0.01, 0.05, 0.3
KINDS = {
    "plain": 8,
    "layered": 4,
    "cancelled": 4,
    "layered, cancelled": 2,
    "expires": 1,
    "late": 3,
    "dies": 1,
    "twice": 1,
}


class Slow(list[tuple[int, int]]):
    """Runs at which a pull pauses after it has written PULLING."""

    seconds = 0.0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        time.sleep(self.seconds)
        return super().__iter__()


@dataclass
class Job:
    """The pull that a worker is told to make, as JSON."""

    kind: str
    sealed: str
    endpoint: str
    digest: str
    tokens: int
    seconds: float
    """Seconds of the pause in the middle of the pull."""

    def run(self, puller: Puller, first_row: int) -> str:
        """Pull it; return 'good', 'WRONG', 'died', or why it was refused."""
        try:
            try:
                handle = puller.receiver.open(bytes.fromhex(self.sealed))
            except NoLink:
                puller.receiver.connect(bytes.fromhex(self.endpoint))
                handle = puller.receiver.open(bytes.fromhex(self.sealed))
            if self.kind == "dies":
                link = puller.receiver.peers.find(handle.epoch).link
                lease = RemoteLease(link, handle, LAYOUT.planes)
                lease.look()
                lease.say(Pull.PULLING)
                return "died"
            half = self.tokens // 2
            runs = Slow([(first_row + half, self.tokens - half)])
            if half:
                runs.append((first_row, half))
            runs.seconds = self.seconds
            puller.receiver.pull(handle, runs)
        except PDServeError as error:
            return f"{type(error).__name__} {error}"
        mine = puller.pool[:, first_row : first_row + self.tokens]
        arrived = [mine[:, half:], mine[:, :half]]
        found = hashlib.sha256(b"".join(_interleaved(arrived)))
        return "good" if found.hexdigest() == self.digest else "WRONG"


def _interleaved(pieces: list) -> Iterator[bytes]:  # type: ignore[type-arg]
    """Return the planes one after another, their tokens in order."""
    for plane in range(LAYOUT.planes):
        for piece in pieces:
            yield piece[plane].tobytes()


_WORKER = """
import json, sys
from pdserve.transfer.lease import remote
from tests.unit.transfer import test_random as this
from tests.unit.transfers import Puller

remote.BEAT_S = this.BEAT_S
puller = Puller("shm", timeout_s=1.0)
for line in sys.stdin:
    print(this.Job(**json.loads(line)).run(puller, 0), flush=True)
assert puller.staging.free == puller.staging.memory.nbytes
"""


class Worker:
    """Pulls one KV cache after another, in its own thread, and over shm in its own process."""

    def __init__(
        self, jobs: queue.SimpleQueue[Job | None], puller: Puller | None, row: int
    ) -> None:
        self.outcomes: list[tuple[str, str]] = []
        self.process = Process(_WORKER) if puller is None else None
        self._jobs, self._taker, self._row = jobs, puller, row
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.outcomes.append((job.kind, self._run(job)))

    def _run(self, job: Job) -> str:
        if self._taker is not None:
            return job.run(self._taker, self._row)
        assert self.process is not None
        try:
            said = self.process.say(json.dumps(vars(job)))
        except BrokenPipeError:
            said = ""
        if not said:  # it was killed
            self.process.kill()
            self.process = Process(_WORKER)
            return "killed"
        return said

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        """Kill its process, whatever it is doing; another one will be started."""
        assert self.process is not None
        self.process.signal(signal.SIGKILL)

    def end(self) -> None:
        if self.process is not None:
            self.process.process.communicate(timeout=10)
            assert self.process.process.returncode == 0


@dataclass
class Holder:
    """A holder that offers KV caches and changes leases, in one thread like an event loop."""

    rng: random.Random
    way: str
    jobs: queue.SimpleQueue[Job | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.sender = Sender(self.way, data_bytes=ARENA, slots=64)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time.monotonic() + seconds, next(self._number), event))

    def tick(self) -> None:
        while self._events and self._events[0][0] <= time.monotonic():
            heapq.heappop(self._events)[2]()
        self.sender.tick()

    def restart(self) -> None:
        self._events.clear()
        self.sender.close()
        self.sender = Sender(self.way, data_bytes=ARENA, slots=64)

    def offer(self, kind: str) -> None:
        tokens = self.rng.randrange(1, MAX_TOKENS)
        self.tick_while(lambda: not self._has_room(tokens))
        until = time.monotonic() + (2e-3 if kind == "expires" else LEASE_S)
        layered = kind.startswith("layered")
        offer = self.sender.begin(tokens, until) if layered else self.sender.offer(tokens, until)
        if layered:
            for planes in range(2, LAYOUT.planes + 1, 2):
                self.after(planes * 5e-4, lambda planes=planes: self._compute(offer, planes))
        if "cancelled" in kind or kind == "late":
            self.after(self.rng.uniform(0, 4e-3), lambda: self._cancel(offer))
        seconds = self.rng.choice([0.0, self.rng.uniform(0, 3e-3)])
        if kind == "late":  # until the slot and the range are reused
            seconds = QUIET_S * self.rng.uniform(0.5, 3)
        job = Job(
            kind=kind,
            sealed=offer.sealed.hex(),
            endpoint=self.sender.holder.endpoint.hex(),
            digest=offer.digest,
            tokens=tokens,
            seconds=seconds,
        )
        for _ in range(2 if kind == "twice" else 1):
            self.jobs.put(job)

    def _has_room(self, tokens: int) -> bool:
        leased = self.sender.lease_manager.allocate(LAYOUT.nbytes(tokens))
        if leased is None:
            return False
        self.sender.lease_manager.give_back(leased, 0.0)
        return True

    def _compute(self, offer: Offer, planes: int) -> None:
        if offer in self.sender.leased:
            self.sender.compute(offer, planes)
            if planes == LAYOUT.planes:
                until = time.monotonic() + LEASE_S
                self.sender.lease_manager.complete(
                    offer.leased, offer.whole.shape[1], planes, 7, until
                )

    def _cancel(self, offer: Offer) -> None:
        if offer in self.sender.leased:
            self.sender.end(offer, time.monotonic())

    def tick_while(self, waiting: Callable[[], bool], within: float = 10.0) -> None:
        deadline = time.monotonic() + within
        self.tick()
        while waiting():
            assert time.monotonic() < deadline, self.sender.held()
            time.sleep(5e-4)
            self.tick()

    def settle(self) -> None:
        """Wait until every lease has ended by itself, within the longest of its bounds."""
        bound = LEASE_S + QUIET_S + 1.0
        self.tick_while(lambda: bool(self._events or self.sender.held()), bound)


@pytest.mark.parametrize("way", ["memcpy", "shm"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.full)])
def test_no_wrong_byte_is_taken_for_good(
    way: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BEAT_S", BEAT_S)
    monkeypatch.setattr(lease_manager, "QUIET_S", QUIET_S)
    rng = random.Random(count)
    holder, puller = Holder(rng, way), None
    if way == "memcpy":
        puller = Puller(way, rows=WORKERS * MAX_TOKENS, timeout_s=1.0, piece_bytes=4096)
    workers = [Worker(holder.jobs, puller, n * MAX_TOKENS) for n in range(WORKERS)]
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    for number, kind in enumerate(kinds):
        holder.tick_while(lambda: holder.jobs.qsize() > IN_FLIGHT)
        if number % 150 == 149:
            holder.restart()
        if number % 100 == 49 and puller is not None:
            _disturb(puller, rng)
        if number % (count // KILLS) == 99 and puller is None:
            rng.choice(workers).kill()
        holder.offer(kind)
    for _ in workers:
        holder.jobs.put(None)
    holder.tick_while(lambda: any(worker.alive for worker in workers))
    for worker in workers:
        worker.end()
    holder.settle()
    counts = holder.sender.lease_manager.counts()
    capacity = holder.sender.lease_manager.arena.capacity
    assert counts[State.FREE][1] + counts[State.CACHED][1] == capacity
    holder.sender.close()
    if puller is not None:
        assert puller.staging.free == puller.staging.memory.nbytes
        puller.close()
    outcomes = Counter(one for worker in workers for one in worker.outcomes)
    _check(outcomes, kinds)
    killed = sum(n for (_, outcome), n in outcomes.items() if outcome == "killed")
    assert killed == (KILLS if puller is None else 0)


def _disturb(puller: Puller, rng: random.Random) -> None:
    """Break the link, make it slow, or make it fast again."""
    assert isinstance(puller.transport, MemcpyTransport)
    if not puller.transport.links:
        return
    link = puller.transport.links[-1]
    if rng.random() < 0.5:
        link.close()
    else:
        link.nap_s = rng.choice([0.0, 2e-5, 5e-5])


def _check(outcomes: Counter[tuple[str, str]], kinds: list[str]) -> None:
    assert sum(outcomes.values()) == len(kinds) + kinds.count("twice")
    assert not [kind for kind, outcome in outcomes if outcome == "WRONG"]
    good = Counter({kind: n for (kind, outcome), n in outcomes.items() if outcome == "good"})
    for kind in ("plain", "layered", "twice"):
        assert good[kind] > 0.5 * kinds.count(kind), (kind, outcomes)
    for kind in ("cancelled", "layered, cancelled", "late"):
        assert good[kind] < kinds.count(kind), "no fault came in time"
    refused = [(kind, o) for kind, o in outcomes if o.startswith((HandleError.__name__, "NoLink"))]
    assert {kind for kind, _ in refused} >= {"cancelled", "late", "twice"}
