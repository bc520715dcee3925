"""A prefill instance: accepts or rejects at once, computes, and keeps KV caches until taken.

A request holds a *slot* from acceptance until its KV cache has been transferred, released or has
expired, so that a slow decode shows as rejections here. There is no queue: at most a *batch* of
requests is not computed yet, and they share the next forward. When the running forward is nearly
over, the next batch is admitted, so that the engine goes from one to the other without waiting for
an offer. Gateways that found it busy may watch, and are notified in turn.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar, Literal

from pdserve import config, errors
from pdserve.engines.protocol import EngineModel, PrefillEngine, PrefillJob
from pdserve.instances import admission
from pdserve.instances.acceptance import TRIAL_S, Acceptance
from pdserve.instances.forwards import Forwards
from pdserve.instances.protocol import Send
from pdserve.instances.slot_admission import SlotAdmission
from pdserve.instances.slots import show
from pdserve.kvcache.arena import Range, State
from pdserve.kvcache.prefix_index import PrefixIndex, shorten
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
    Busy,
    Described,
    Failed,
    Prefilled,
    PrefillRequest,
    Released,
    Reply,
    Watch,
)
from pdserve.supervision import Background
from pdserve.transfer.producer.holder import Holder
from pdserve.transfer.producer.kv_range import KVRange
from pdserve.transfer.producer.lease_manager import LeasedRange, LeaseManager

TICK_S = 0.02
# Interval of checks, while gateways watch, of what decodes have taken: the time in which a free
# slot is noticed. One check takes some 50 us.
LOOK_S = 0.001
# Maximum ranges whose lease ended while a decode was reading them; with more, nothing is accepted.
MAX_QUARANTINED = 16


@dataclass(slots=True, eq=False)
class _Held:
    """A request that holds a slot."""

    request: PrefillRequest
    send: Send
    acceptance: Acceptance
    leased: LeasedRange
    kv: KVRange
    job: PrefillJob
    salt: str
    deadline: float
    """Time after which its first token is useless."""
    computing: bool = True
    """True if its first token is not known yet."""
    cancelled: bool = False


class PrefillInstance:
    """One engine in the prefill role. Everything but the forward runs in the event loop.

    Args:
        holder: holder of its memory, whose data is the arena; closed with the instance.
    """

    role: ClassVar[Literal["prefill"]] = "prefill"

    def __init__(
        self,
        name: str,
        model: EngineModel,
        engine: PrefillEngine,
        limits: config.Prefill,
        holder: Holder,
        metrics: Registry,
    ) -> None:
        self._name = name
        self._model = model
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._holder = holder
        self._prefixes = PrefixIndex[Range]()
        self._leases = LeaseManager(holder, self._prefixes.remove)
        self._pending: list[_Held] = []
        self._on_trial: _Held | None = None
        """A suspect that has been accepted and is not pending yet."""
        self._work = asyncio.Event()
        self._slots = SlotAdmission[_Held](limits.slots, self._places, self._sweep)
        self._stirred = asyncio.Event()
        """Set when something is free for watching gateways, or may become free without a further
        call."""
        self._forwards = Forwards(nearly_over=self._stir)
        self._refused_with = -1
        """Available bytes of the arena when they were too few for a request; -1: more have become
        free since."""
        self._tasks = Background()

    def start(self) -> None:
        """Begin to compute and to keep time; called once in the running loop."""
        # An event loop's clock is CLOCK_MONOTONIC, which leases and handles use, too.
        self._loop = asyncio.get_running_loop()
        self._tasks.start(self._compute(), self._keep_time(), self._attend())

    async def close(self) -> None:
        """Stop, and release the memory; receivers that have mapped it may still read leases."""
        await self._tasks.close()
        self._engine.close()
        failed = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        for held in [held for held in self._slots.held.values() if held.computing]:
            self._end(held, failed)
        self._slots.watches.close(failed)
        self._holder.close()

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""
        return self._model.context_length

    def describe(self, send: Send) -> None:
        """Send how its memory is reached."""
        send(Described(self._holder.endpoint), True)

    def transferred(self, request_id: str, send: Send) -> None:
        """Refuse: the lease shows that a decode has the KV cache, and no gateway is asked to tell.

        Raises:
            InstanceError: always.
        """
        raise errors.InstanceError(f"a Transferred came to a {type(self).__name__}")

    # ---------------------------------------------------------------- admission

    def submit(self, request: PrefillRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the result."""
        try:
            model = self._model
            tokens = admission.prompt(request, model.context_length, model.vocabulary)
        except errors.InvalidRequest as error:
            self._slots.reject(request, f"{self._name}: {error}", send)
            return
        nbytes = len(tokens) * self._holder.token_bytes
        if nbytes > self._leases.arena.capacity:
            message = (
                f"the KV cache of {len(tokens)} prompt tokens takes {nbytes} bytes; "
                f"{self._name}'s arena has {self._leases.arena.capacity}"
            )
            self._slots.reject(request, message, send)
            return
        now = self._loop.time()
        if (refusal := self._slots.refusal(request, now)) is not None:
            send(refusal, True)
            return
        leased = self._leases.allocate(nbytes)
        if leased is None:
            self._refused_with = self._available()
            send(Busy("arena"), True)
            return
        kv = self._holder.kv_range(leased.range.offset, leased.range.nbytes)
        job = PrefillJob(tokens, kv.whole, request.sampling, kv.publish, request.resumed_tokens)
        held = _Held(
            request=request,
            send=send,
            acceptance=Acceptance(send),
            leased=leased,
            kv=kv,
            job=job,
            salt=request.tenant,
            deadline=now + request.deadline_ms / 1e3,
        )
        self._slots.take(held)
        if request.layered:
            self._open_early(held)
        else:
            held.acceptance.begin(request.hurry or request.suspect)
        if request.suspect:
            self._on_trial = held
            self._loop.call_later(TRIAL_S, self._try, held)
        else:
            self._pending.append(held)
            self._work.set()

    def _try(self, held: _Held) -> None:
        """Begin to compute a suspect like other requests, now that its acceptance has been sent."""
        self._on_trial = None
        if held.cancelled:
            self._end(held, Failed(errors.Cancelled.code, "released"))
        else:
            self._pending.append(held)
            self._work.set()

    def _open_early(self, held: _Held) -> None:
        """Let a decode follow the computation."""
        tokens = len(held.job.tokens)
        handle = self._leases.grant(held.leased, tokens, held.deadline + self._limits.lease_s)

        def filled(planes: int) -> None:
            held.kv.publish(planes)
            self._leases.fill(held.leased, planes)

        held.job.filled = filled
        held.acceptance.say(handle)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once when a slot is free for this gateway, which may be now."""
        self._slots.watch(request, stream, send, self._loop.time())
        self._stirred.set()

    def _places(self) -> int:
        """Return the number of further prompts that the next forward has room for."""
        if len(self._leases.quarantined) >= MAX_QUARANTINED:
            return 0
        uncomputed = len(self._pending) + self._forwards.prompts + (self._on_trial is not None)
        return self._limits.batch - uncomputed

    def _available(self) -> int:
        """Return the bytes of the arena that are free or can be evicted."""
        counts = self._leases.counts()
        return counts[State.FREE][1] + counts[State.CACHED][1]

    def release(self, request_id: str, send: Send) -> None:
        """Release whatever is held for the request, or end a watch."""
        self._slots.watches.release(request_id)
        held = self._slots.held.get(request_id)
        if held is not None:
            if held.computing:
                held.cancelled = True
                if held in self._pending:
                    self._pending.remove(held)
                    self._end(held, Failed(errors.Cancelled.code, "released"))
            else:
                self._take_back(held)
        send(Released(), True)

    # ------------------------------------------------------------------ compute

    async def _compute(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._pending:
                self._give_up_late()
                if self._pending:
                    await self._forward(*self._next_batch())

    async def _forward(self, batch: list[_Held], sources: list[Range]) -> None:
        """Compute prompts together, and hand each KV cache over."""
        began = self._loop.time()
        uncached = sum(len(held.job.tokens) - held.job.cached for held in batch)
        try:
            with self._forwards.running(len(batch), uncached):
                tokens = await self._engine.prefill([held.job for held in batch])
        except Exception as error:  # one failed forward may not end the instance
            failed = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
            for held in batch:
                self._end(held, failed)
            return
        finally:
            for source in sources:
                self._leases.arena.unpin(source)
                self._refused_with = -1
        self._metrics.add(catalogue.STEPS, 1, instance=self._name)
        ms = (self._loop.time() - began) * 1e3
        for held, token in zip(batch, tokens, strict=True):
            self._hand_over(held, token, ms)

    def _give_up_late(self) -> None:
        """Give up the prompts whose limit has passed."""
        now = self._loop.time()
        for held in [held for held in self._pending if now >= held.deadline]:
            self._pending.remove(held)
            self._end(held, Failed(errors.Unavailable.code, "too late to begin with it"))

    def _next_batch(self) -> tuple[list[_Held], list[Range]]:
        """Return the prompts of the next forward in order of arrival, and their prefixes' ranges.

        Prompts with the same first block are not computed together: the second waits for the first,
        and reuses its prefix.
        """
        batch: list[_Held] = []
        sources: list[Range] = []
        openings: set[tuple[str, bytes]] = set()
        uncached = 0
        block = self._prefixes.block_tokens
        for held in self._pending:
            job = held.job
            alone = job.sampling.reproducible
            found = None if alone else self._prefixes.find(job.tokens, held.salt)
            opening = held.salt, job.tokens[:block].tobytes()
            cached = found[1] if found else 0
            cost = len(job.tokens) - cached
            if batch and (
                alone
                or uncached + cost > self._limits.batch_tokens
                or (found is None and len(job.tokens) > block and opening in openings)
            ):
                continue
            if found is not None:
                source, job.cached = found
                job.prefix = self._holder.kv_range(source.offset, source.nbytes)
                self._leases.arena.pin(source)
                sources.append(source)
            batch.append(held)
            openings.add(opening)
            uncached += cost
            if alone:
                break
        chosen = set(map(id, batch))
        self._pending = [held for held in self._pending if id(held) not in chosen]
        return batch, sources

    def _hand_over(self, held: _Held, token: int, compute_ms: float) -> None:
        """Lease the complete KV cache to a decode that will pull it, or that follows already."""
        if held.cancelled:
            self._end(held, Failed(errors.Cancelled.code, "released"))
            return
        held.acceptance.end()
        held.computing = False
        self._stir()
        planes = self._model.layout.planes
        held.kv.publish(planes)
        until = self._loop.time() + self._limits.lease_s
        # The handle is empty, and was sent before, if a decode follows.
        handle = self._leases.complete(held.leased, len(held.job.tokens), planes, token, until)
        stored = shorten(self._prefixes.add(held.leased.range, held.job.tokens, held.salt))
        eos = token in self._model.eos_ids
        held.send(Prefilled(token, eos, handle, held.job.cached, compute_ms, stored), True)

    def _end(self, held: _Held, reply: Reply) -> None:
        """End a request that has failed or is unwanted before its first token."""
        held.acceptance.end()
        self._take_back(held)
        held.send(reply, True)

    # ------------------------------------------------------------------- leases

    def _take_back(self, held: _Held) -> None:
        """Free what is held for a request that was transferred, was released, failed or expired."""
        del self._slots.held[held.request.id]
        self._stir()
        self._leases.give_back(held.leased, self._loop.time())

    def _sweep(self, now: float) -> bool:
        """End the leases that are over, and tell whether there may be memory for another prompt."""
        self._end_leases(now)
        if 0 <= self._refused_with < self._available():
            self._refused_with = -1
        # Without a request's size it is unknown whether the arena has room for it, but if no bytes
        # have become free since a refusal, it has none.
        return self._refused_with < 0

    def _end_leases(self, now: float) -> None:
        for held in list(self._slots.held.values()):
            if not held.computing and self._leases.over(held.leased, now):
                self._take_back(held)
        self._leases.sweep(now)

    def _stir(self) -> None:
        """Wake the task that notifies watching gateways, since something may soon be free."""
        if self._slots.watches:
            self._stirred.set()

    async def _attend(self) -> None:
        """While gateways watch, check every LOOK_S seconds what has ended."""
        while True:
            await self._stirred.wait()
            self._slots.look(self._loop.time())
            watches = self._slots.watches
            lent = any(not held.computing for held in self._slots.held.values())
            if not watches or not (lent or self._leases.quarantined or watches.kept):
                self._stirred.clear()
            await asyncio.sleep(LOOK_S)

    async def _keep_time(self) -> None:
        while True:
            self._end_leases(self._loop.time())
            self._publish()
            await asyncio.sleep(TICK_S)

    def _publish(self) -> None:
        used, slots = len(self._slots.held), self._limits.slots
        show(self._metrics, self._name, used, slots, self._slots.watches)
        gauge = self._metrics.set
        for state, (ranges, _) in self._leases.counts().items():
            if state is not State.FREE:
                gauge(catalogue.KV_LEASES, ranges, instance=self._name, state=state.value)
