"""Prefills, decodes and a scheduler in one event loop, joined by messages encoded as on the wire.

Everything is real except the computation (the emulated engine) and the wire (`Link`): shared
memory, leases, arenas and block pools are those of a deployment. `virtual` runs a test under a
clock that jumps, so that waiting costs nothing; `real` under the usual one.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import random
import time
from collections import defaultdict
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import async_solipsism
import msgspec
import numpy as np
from perf.baselines.policies import BoundScheduler

from pdserve import config
from pdserve.control.assignment import FIRST, Assignment
from pdserve.engines.emulated import EmulatedDecode, EmulatedModel, EmulatedPrefill, Profile
from pdserve.errors import InstanceError, PDServeError
from pdserve.instances.assigned import Assigned
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.instances.protocol import DecodeRole, PrefillRole
from pdserve.kvcache.arena import State as RangeState
from pdserve.kvcache.sharding import sharding_for
from pdserve.observability.catalogue import METRICS
from pdserve.observability.metrics import Histogram, Registry
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import Failed, Reply
from pdserve.rpc.server import Answers, Call
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Chunk, Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.transfer.consumer.probe import Probe
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.producer.holder import Holder, region_name
from tests.unit.transfers import transport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from typing_extensions import Self

    from pdserve.engines.protocol import DecodeSequence, PrefillJob, Tokens
    from pdserve.scheduling.forwarding import Forwarding
    from pdserve.transfer.consumer.cost_model import Strategy

SERIES = {
    name if not isinstance(metric, Histogram) else f"{name}_{suffix}"
    for name, metric in METRICS.items()
    for suffix in ("bucket", "sum", "count")
}
VOCABULARY, EOS = 997, 2
# No test takes longer than this; a virtual second costs about a millisecond.
LIMIT_S = 120.0
# Within which a cancelled or failed request has released everything (design section 8).
CLEAN_S = 0.2

Message = messages.Request | Reply


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop whose time jumps to the next timer when nothing is ready."""
    return _in_loop(test, async_solipsism.EventLoop)


def real(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in the usual loop."""
    return _in_loop(test, asyncio.new_event_loop)


def _in_loop(test: Callable[..., Any], make: Callable[[], Any]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        loop = make()
        unheard: list[str] = []
        loop.set_exception_handler(lambda _, context: unheard.append(repr(context)))
        try:
            # The probe of shared memory does not matter here, and takes a tenth of a second.
            with mock.patch.object(Probe, "mapped", return_value=4e9):
                loop.run_until_complete(asyncio.wait_for(test(*args, **kwargs), LIMIT_S))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
        assert not unheard, unheard

    return run


class LoopClock:
    """Implements `pdserve.transfer.clock.Clock` by the running loop's time."""

    perf_counter = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self._time = asyncio.get_running_loop().time
        self._looks = 0

    def monotonic(self) -> float:
        """Return the time as if each call took a nanosecond, so that everything takes some time."""
        self._looks += 1
        return self._time() + self._looks * 1e-9


class Link:
    """A channel to an instance of the same loop, which records the messages of both directions.

    Its two ends are the real ones. Each direction keeps its order. `delay` (least, most; seconds)
    and the messages that `lose` selects come from seeded generators.
    """

    def __init__(self, name: str, instance: Assigned, seed: int, number: int = FIRST) -> None:
        self.requests: list[messages.Request] = []
        self.replies: list[tuple[str, Reply]] = []
        self.responses = 0
        """The number of responses that carried replies."""
        self.lose: Callable[[Message], bool] = lambda message: False
        self.delay = (0.0, 0.0)
        self.rng = random.Random(seed)
        self.calls = Calls()
        self.broken: str | None = None
        self.number = number
        """Number of the assignment that its messages are for."""
        self._name = name
        self._instance = instance
        self._answers = Answers(self._send)
        self._unanswered: set[str] = set()
        self._last = {"in": 0.0, "out": 0.0}

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = self.calls.open(call)
        if self.broken:
            replies.fail(InstanceError(f"{self._name}: {self.broken}"))
        else:
            self._after("in", self._arrive, call, messages.encode(request))
        return replies

    def forget(self, call: str) -> None:
        self.calls.forget(call)

    async def close(self) -> None:
        self.break_("the channel was closed")

    def break_(self, reason: str, kind: type[InstanceError] = InstanceError) -> None:
        """Fail the open calls and, until `broken` is None again, every later call."""
        self.broken = reason
        self.calls.fail_all(kind(f"{self._name}: {reason}"))

    def _arrive(self, call: str, payload: bytes) -> None:
        request = messages.decode_request(payload)
        self.requests.append(request)
        if self.broken or self.lose(request):
            return
        ours = Call(call, f"stream/{call}")
        self._unanswered.add(call)
        self._answers.open(ours)
        reply = functools.partial(self._answers.reply, ours)
        try:
            submit(self._instance, self.number, request, reply)
        except PDServeError as error:
            reply(Failed(error.code, str(error)), True)

    def _send(self, key: str, data: bytes | None, last: bool) -> None:
        assert key in self._unanswered, "a response after the last one"
        if last:
            self._unanswered.remove(key)
        if data is not None:
            self.responses += 1
            self._after("out", self.arrive_back, key, data)

    def arrive_back(self, key: str, data: bytes) -> None:
        try:
            replies = messages.decode_replies(data).replies
            self.replies += replies
            if not self.broken:
                heard = [(call, reply) for call, reply in replies if not self.lose(reply)]
                self.calls.deliver(key, messages.encode_replies(heard))
        except InstanceError as error:
            self.calls.fail_all(error)

    def _after(self, way: str, function: Callable[..., None], *args: Any) -> None:
        loop = asyncio.get_running_loop()
        if self.delay == (0.0, 0.0):
            loop.call_soon(function, *args)
            return
        when = loop.time() + self.rng.uniform(*self.delay)
        # Timers of the same moment have no order.
        self._last[way] = max(when, self._last[way] + 1e-9)
        loop.call_at(self._last[way], function, *args)

    def of(self, kind: type) -> list[Any]:
        """Return the messages of a kind that have gone over it."""
        return [
            one for one in (*self.requests, *(r for _, r in self.replies)) if isinstance(one, kind)
        ]


def submit(
    instance: Assigned,
    number: int,
    request: messages.Request,
    send: Callable[[Reply, bool], None],
) -> None:
    """Do the work of the Triton model around an instance; a gateway has one connection."""
    instance.handle(number, request, getattr(request, "gateway", ""), send)


def assigned(
    name: str,
    role: PrefillRole | DecodeRole,
    assignment: Assignment | None = None,
    keep: Callable[[Assignment], None] = lambda _: None,
) -> Assigned:
    """Put an instance of a fixed role under an assignment, the first one by default."""
    assignment = assignment or Assignment(FIRST, role.role)
    return Assigned(name, role.role, assignment, role, process(name), keep)


def process(name: str) -> bytes:
    """Return the epoch of the only process of an instance."""
    return name.encode()[-8:].rjust(8, b"-")


class Model(EmulatedModel):
    """An emulated model whose tokens a test may set: `script` (prompt, position) -> token."""

    script: Callable[[Tokens, int], int | None] = staticmethod(lambda prompt, position: None)

    def token(self, prompt: Tokens, position: int) -> int:
        token = self.script(prompt, position)
        return super().token(prompt, position) if token is None else token


class Prefill(EmulatedPrefill):
    """Records the prompts of each forward; each of `failures` is raised in one forward."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.forwards: list[list[PrefillJob]] = []
        self.failures: list[Exception] = []

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        self.forwards.append(list(jobs))
        tokens = await super().prefill(jobs)
        if self.failures:
            raise self.failures.pop()
        return tokens


class Decode(EmulatedDecode):
    """Records the requests of each step; each of `failures` fails a step, of `refusals` a join."""

    def __init__(self, model: Model, blocks: int, block_size: int) -> None:
        super().__init__(model, blocks, block_size)
        self.steps: list[list[DecodeSequence]] = []
        self.failures: list[Exception] = []
        self.refusals: list[Exception] = []

    def joined(self, sequence: DecodeSequence) -> None:
        if self.refusals:
            raise self.refusals.pop()
        super().joined(sequence)

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        self.steps.append(list(batch))
        tokens = await super().step(batch)
        if self.failures:
            raise self.failures.pop()
        return tokens


def model(folder: Path, **profile: Any) -> Model:
    """Make an emulated model with `VOCABULARY` tokens, of which `EOS` is one."""
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY, "eos_token_id": EOS}))
    path = folder / "profile.yaml"
    path.write_bytes(msgspec.yaml.encode(msgspec.convert({"speed": 1.0, **profile}, Profile)))
    return Model(str(folder), str(path))


@dataclass
class Site:
    """A scheduler over `prefills` and `decodes` instances; `async with` starts and stops them."""

    folder: Path
    prefills: int = 1
    decodes: int = 1
    profile: dict[str, Any] = field(default_factory=dict)
    prefill: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    gateway: dict[str, Any] = field(default_factory=dict)
    stall_s: float = 5.0
    seed: int = 0
    pulls: int = 4
    linked: bool = True
    """Every decode is linked to every prefill from the start, and KVLinks does not run."""
    layered: bool | None = None
    transport: str = "shm"
    strategy: Strategy | None = None
    scheduler_type: type[Scheduler] = Scheduler

    async def __aenter__(self) -> Self:
        self.rng = random.Random(self.seed)
        self.model = model(self.folder, **self.profile)
        self.metrics = Registry()
        self.totals: defaultdict[str, float] = defaultdict(float)
        slots = self.prefill.get("slots", 4)
        small = {"slots": slots, "batch": slots, "arena_mib": 4, "lease_s": 2.0}
        limits_p = config.Prefill(**{**small, **self.prefill})
        limits_d = config.Decode(**{"blocks": 256, **self.decode})
        self.p_engines = [Prefill(self.model) for _ in range(self.prefills)]
        self.d_engines = [
            Decode(self.model, limits_d.blocks, limits_d.block_size) for _ in range(self.decodes)
        ]
        prefill_ranks, decode_ranks = limits_p.tensor_parallel, limits_d.tensor_parallel
        sharding = sharding_for(prefill_ranks, decode_ranks, self.model.layout.kv_heads)
        terms = Terms(self.model.fingerprint, self.model.layout, b"k" * 32, sharding)
        slots = limits_p.slots + MAX_QUARANTINED
        self.holders = [
            Holder(
                f"prefill_{i}",
                region_name(f"prefill_{i}"),
                limits_p.arena_mib << 20,
                slots,
                terms,
                [transport(self.transport)],
            )
            for i in range(self.prefills)
        ]
        self.p = [
            PrefillInstance(f"prefill_{i}", self.model, engine, limits_p, holder, self.metrics)
            for i, (engine, holder) in enumerate(zip(self.p_engines, self.holders, strict=True))
        ]
        self.receivers = [
            Receiver(
                terms,
                [transport(self.transport)],
                engine.pool,
                Staging(np.ones((2, 1 << 16), np.uint8)),
                ranks=decode_ranks,
                strategy=self.strategy,
                clock=LoopClock(),
            )
            for engine in self.d_engines
        ]
        self.d = [
            DecodeInstance(
                f"decode_{i}",
                self.model,
                engine,
                limits_d,
                receiver,
                self.pulls,
                limits_p.batch_tokens,
                self.metrics,
            )
            for i, (engine, receiver) in enumerate(zip(self.d_engines, self.receivers, strict=True))
        ]
        self.assigned = {one._name: assigned(one._name, one) for one in self._engine_instances()}
        """The instances under their assignments, by name."""
        if self.linked:
            for receiver in self.receivers:
                for holder in self.holders:
                    receiver.connect(holder.endpoint)
        for engine_instance in self._engine_instances():
            engine_instance.start()
        self.limits = limits_p, limits_d
        self.besides: list[Site] = []
        self._connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for site in (self, *self.besides):
            for role in site.instances:
                for instance in role:
                    await instance.close()
        for engine_instance in self._engine_instances():
            await engine_instance.close()

    def _connect(self) -> None:
        self.p_links = [self._link(p._name, self.seed + i) for i, p in enumerate(self.p)]
        self.d_links = [self._link(d._name, self.seed - i) for i, d in enumerate(self.d)]
        self.instances = [
            [Instance(f"{role}_{i}", link) for i, link in enumerate(links)]
            for role, links in (("prefill", self.p_links), ("decode", self.d_links))
        ]
        prefills, decodes = self.instances
        self.kv_links = KVLinks(prefills, decodes, self.layered, "gateway", self.metrics)
        self.scheduler = self.scheduler_type(
            prefills,
            decodes,
            self.kv_links,
            self.metrics,
            gateway=config.Gateway(**{"stall_s": self.stall_s, **self.gateway}),
            prefill=self.limits[0],
            decode=self.limits[1],
            rng=self.rng,
        )

    def _link(self, name: str, seed: int) -> Link:
        return Link(name, self.assigned[name], seed)

    def beside(self) -> Site:
        """Return another gateway over the same instances, with its own links and metrics."""
        other = copy.copy(self)
        other.rng = random.Random(self.rng.random())
        other.metrics, other.totals = Registry(), defaultdict(float)
        other._connect()
        self.besides.append(other)
        return other

    def _engine_instances(self) -> list[PrefillInstance | DecodeInstance]:
        return [*self.p, *self.d]

    def prompt(self, tokens: int, prefix: bytes = b"") -> bytes:
        """Return little-endian int32 ids: those of `prefix`, then `tokens` random ones."""
        ids = [self.rng.randrange(3, VOCABULARY) for _ in range(tokens)]
        return prefix + np.array(ids, "<i4").tobytes()

    def request(self, prompt: int | bytes = 20, **fields: Any) -> Request:
        """Make a request, which is not sent yet; its id is the next number."""
        self._ids = getattr(self, "_ids", 0) + 1
        data = self.prompt(prompt) if isinstance(prompt, int) else prompt
        return Request(
            id=str(self._ids), prompt=data, **{"max_tokens": 8, "stream": True, **fields}
        )

    async def chunks(self, request: Request) -> list[Chunk]:
        """Serve the request to its end."""
        async with aclosing(self.scheduler.run(request)) as chunks:
            return [chunk async for chunk in chunks]

    async def answer(self, request: Request) -> list[int]:
        return [token for chunk in await self.chunks(request) for token in chunk.ids]

    def start(self, request: Request) -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.answer(request))

    def expected(self, request: Request) -> list[int]:
        """Return the whole answer, unless a script says otherwise."""
        prompt = np.frombuffer(request.prompt, "<i4")
        return [self.model.token(prompt, i) for i in range(request.max_tokens)]

    def total(self, name: str, **labels: str) -> float:
        """Return a counter's total over all series that have these labels."""
        assert name in SERIES, name
        for change in self.metrics.drain():
            if change.kind == "counter":
                self.totals[repr((change.name, sorted(change.labels)))] += change.value
        wanted = [repr(pair) for pair in labels.items()]
        return sum(
            value
            for key, value in self.totals.items()
            if key.startswith(f"('{name}',") and all(pair in key for pair in wanted)
        )

    def level(self, name: str, **labels: str) -> float:
        """Return a gauge's level, summed over all series that have these labels."""
        gauge = METRICS[name]
        return sum(
            value
            for (metric, values), value in self.metrics._levels.items()
            if metric is gauge
            and labels.items() <= dict(zip(gauge.label_names, values, strict=True)).items()
        )

    async def idle(self, within: float = CLEAN_S) -> None:
        """Check that nothing is held after `within` seconds and one tick of the gauges."""
        await asyncio.sleep(within)
        assert self.held() == {}, self.held()
        await asyncio.sleep(0.11)
        for name, labels in (
            ("pdserve_slots", {"state": "used"}),
            ("pdserve_kv_blocks", {"state": "used"}),
            *(
                ("pdserve_kv_leases", {"state": state.value})
                for state in (
                    RangeState.ALLOCATED,
                    RangeState.LEASED,
                    RangeState.IN_TRANSFER,
                    RangeState.QUARANTINED,
                )
            ),
        ):
            assert self.level(name, **labels) == 0, (name, labels)

    def held(self) -> dict[str, int]:
        """Return everything that a request may hold, as far as it is not zero."""
        counts: defaultdict[str, int] = defaultdict(int)
        for site in (self, *self.besides):
            counts["waiting for a prefill"] += sum(map(len, prefill_lines(site.scheduler)))
            counts["waiting for a decode"] += len(site.scheduler.decodes)
            for role, links in zip(site.instances, (site.p_links, site.d_links), strict=True):
                for instance, link in zip(role, links, strict=True):
                    counts[f"{instance.name} open"] += instance.load.open
                    counts[f"{instance.name} calls"] += len(link.calls)
        for prefill in self.p:
            counts |= {
                f"{prefill._name} slots": len(prefill._slots.held),
                f"{prefill._name} pending": len(prefill._computation.pending),
                f"{prefill._name} leases": len(prefill._exports.holder.leases),
                f"{prefill._name} quarantined": len(prefill._exports.leases.quarantined),
                f"{prefill._name} ranges": len(prefill._exports.leases.arena._evictor.kept),
            }
        for decode in self.d:
            counts |= {
                f"{decode._name} open": len(decode._admission.open),
                f"{decode._name} running": len(decode._batch.calls),
                f"{decode._name} blocks": decode._blocks.pool.used_blocks,
                f"{decode._name} pulls": len(decode._kv_imports),
            }
        return {what: count for what, count in counts.items() if count}


def prefill_lines(scheduler: Scheduler) -> list[Forwarding[Any]]:
    """Return the queues in which requests wait for a prefill: one, or one for each prefill."""
    if isinstance(scheduler, BoundScheduler):
        return [queue.forwarding for queue in scheduler.queues.values()]
    return [scheduler.prefills]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Check a condition again and again, in real time; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
