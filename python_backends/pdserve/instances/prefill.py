"""A prefill instance: accepts or rejects at once, computes, and keeps the KV cache until taken.

A request holds a *slot* from acceptance until its KV cache has been transferred, given up or left
to expire, so that a slow decode shows as rejection here. There is no queue: of those that are not
computed yet there are no more than a *batch*, and they share the next forward. When the running one
is nearly over, the next batch is let in, so that the engine goes from one to the other without
waiting for an offer. Gateways that found it busy may watch, and are told in turn.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pdserve import config, errors
from pdserve.engines.protocol import EngineModel, PrefillEngine, PrefillJob
from pdserve.instances import admission
from pdserve.instances.acceptance import TRIAL_S, Acceptance
from pdserve.instances.forwards import Forwards
from pdserve.instances.slot_watches import WATCHED_S, Send, SlotWatches
from pdserve.instances.slots import show
from pdserve.kvcache.arena import Range, State
from pdserve.kvcache.prefix_index import PrefixIndex, shorten
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
    SUSPECT,
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
# So often, while somebody waits, it is looked at what decodes have taken: from then on a slot is
# idle. To wake up and look takes some 50 us.
LOOK_S = 0.001
# Ranges whose lease ended while a decode was reading them; with more, nothing is accepted.
MAX_QUARANTINED = 16


@dataclass(slots=True, eq=False)
class _Held:
    """What a slot is taken by."""

    request: PrefillRequest
    send: Send
    acceptance: Acceptance
    leased: LeasedRange
    kv: KVRange
    job: PrefillJob
    salt: str
    deadline: float
    """When its first token will be worthless."""
    computing: bool = True
    """The first token is not known yet."""
    cancelled: bool = False


class PrefillInstance:
    """One engine in the prefill role. Everything but the forward runs in the event loop.

    Args:
        holder: of its memory; its data is the arena. Closed with the instance.
    """

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
        self._held: dict[str, _Held] = {}
        self._pending: list[_Held] = []
        self._on_trial: _Held | None = None
        """A suspect that has been accepted and is not pending yet."""
        self._work = asyncio.Event()
        self._watches = SlotWatches()
        self._stirred = asyncio.Event()
        """Something is free for those who watch, or may soon be so by itself."""
        self._forwards = Forwards(nearly_over=self._stir)
        self._refused_with = -1
        """Bytes that the arena had to give when they were too few; -1: some have come since."""
        self._tasks = Background()

    def start(self) -> None:
        """Begin to compute and to keep time; called once in the running loop."""
        # An event loop's clock is CLOCK_MONOTONIC, which leases and handles count by.
        self._loop = asyncio.get_running_loop()
        self._tasks.start(self._compute(), self._keep_time(), self._attend())

    async def close(self) -> None:
        """Stop, and let go of the memory: who has it mapped may still take what is leased."""
        await self._tasks.close()
        self._engine.close()
        failed = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        for held in [held for held in self._held.values() if held.computing]:
            self._end(held, failed)
        self._watches.close(failed)
        self._holder.close()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._model.context_length

    def describe(self, send: Send) -> None:
        """How its memory is reached."""
        send(Described(self._holder.endpoint), True)

    # ---------------------------------------------------------------- admission

    def submit(self, request: PrefillRequest, send: Send) -> None:
        """Accept or reject, at once; ``send`` gets the rejection or, later, the result."""
        try:
            model = self._model
            tokens = admission.prompt(request, model.context_length, model.vocabulary)
        except errors.InvalidRequest as error:
            self._watches.took(request.gateway)
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        nbytes = len(tokens) * self._holder.token_bytes
        if nbytes > self._leases.arena.capacity:
            message = (
                f"the KV cache of {len(tokens)} prompt tokens takes {nbytes} bytes; "
                f"{self._name}'s arena has {self._leases.arena.capacity}"
            )
            self._watches.took(request.gateway)
            send(Failed(errors.InvalidRequest.code, message), True)
            return
        if request.id in self._held:
            send(Failed(errors.InvalidRequest.code, f"request id {request.id} is in use"), True)
            return
        self._look(offering=request.gateway)
        if not self._watches.admits(request.gateway, self._free()):
            send(Busy("slots"), True)
            return
        if request.suspect and any(
            held.computing and held.request.suspect for held in self._held.values()
        ):
            send(Busy(SUSPECT), True)
            return
        leased = self._leases.allocate(nbytes)
        if leased is None:
            self._refused_with = self._available()
            send(Busy("arena"), True)
            return
        kv = self._holder.kv_range(leased.range.offset, leased.range.nbytes)
        job = PrefillJob(tokens, kv.whole, request.sampling, kv.publish, request.resumed_tokens)
        self._watches.took(request.gateway)
        held = _Held(
            request=request,
            send=send,
            acceptance=Acceptance(send),
            leased=leased,
            kv=kv,
            job=job,
            salt=request.tenant,
            deadline=self._loop.time() + request.deadline_ms / 1e3,
        )
        self._held[request.id] = held
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
        """A suspect's acceptance has been told: it is computed like others from here on."""
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
        """Say once when a slot is free for this gateway, which may be now."""
        self._watches.add(request, stream, send)
        self._loop.call_later(WATCHED_S, self._watches.release, request.id)
        self._look()
        self._stirred.set()

    def _look(self, offering: str | None = None) -> None:
        """See what has become free, and tell whose turn it is."""
        self._sweep()
        if 0 <= self._refused_with < self._available():
            self._refused_with = -1
        # Without a size it is not known whether the arena has room, but this is: nothing has
        # come back since it had none.
        free = self._free() if self._refused_with < 0 else 0
        self._watches.tell(free, self._loop.time(), offering)

    def _free(self) -> int:
        """Slots that could be taken."""
        if len(self._leases.quarantined) >= MAX_QUARANTINED:
            return 0
        uncomputed = len(self._pending) + self._forwards.prompts + (self._on_trial is not None)
        return min(self._limits.batch - uncomputed, self._limits.slots - len(self._held))

    def _available(self) -> int:
        """Bytes of the arena that are free, or can be had by eviction."""
        counts = self._leases.counts()
        return counts[State.FREE][1] + counts[State.CACHED][1]

    def release(self, request_id: str, send: Send) -> None:
        """Whatever is held for the request, or a watch, is wanted no longer."""
        self._watches.release(request_id)
        held = self._held.get(request_id)
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
        """Compute prompts together, and hand each over."""
        began = self._loop.time()
        uncached = sum(len(held.job.tokens) - held.job.cached for held in batch)
        try:
            with self._forwards.running(len(batch), uncached):
                tokens = await self._engine.prefill([held.job for held in batch])
        except Exception as error:  # one bad forward may not end the instance
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
        """The prompts of the next forward, first come first, and the ranges their prefixes are in.

        Prompts that begin alike are not computed side by side: the second waits for
        the first, and reuses it.
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
        """The KV cache is there: lease it to the decode to come, or that follows already."""
        if held.cancelled:
            self._end(held, Failed(errors.Cancelled.code, "released"))
            return
        held.acceptance.end()
        held.computing = False
        self._stir()
        planes = self._model.layout.planes
        held.kv.publish(planes)
        until = self._loop.time() + self._limits.lease_s
        # Empty, and told before, if a decode follows.
        handle = self._leases.complete(held.leased, len(held.job.tokens), planes, token, until)
        stored = shorten(self._prefixes.add(held.leased.range, held.job.tokens, held.salt))
        eos = token in self._model.eos_ids
        held.send(Prefilled(token, eos, handle, held.job.cached, compute_ms, stored), True)

    def _end(self, held: _Held, reply: Reply) -> None:
        """Before its first token the request has failed or is unwanted."""
        held.acceptance.end()
        self._take_back(held)
        held.send(reply, True)

    # ------------------------------------------------------------------- leases

    def _take_back(self, held: _Held) -> None:
        """What is held for a request ends: taken, unwanted, failed, or over."""
        del self._held[held.request.id]
        self._stir()
        self._leases.give_back(held.leased, self._loop.time())

    def _sweep(self) -> None:
        now = self._loop.time()
        for held in list(self._held.values()):
            if not held.computing and self._leases.over(held.leased, now):
                self._take_back(held)
        self._leases.sweep(now)

    def _stir(self) -> None:
        """Something is free, or may soon be so by itself; matters to those who watch alone."""
        if self._watches:
            self._stirred.set()

    async def _attend(self) -> None:
        """While somebody watches, see soon what has ended."""
        while True:
            await self._stirred.wait()
            self._look()
            lent = any(not held.computing for held in self._held.values())
            if not self._watches or not (lent or self._leases.quarantined or self._watches.kept):
                self._stirred.clear()
            await asyncio.sleep(LOOK_S)

    async def _keep_time(self) -> None:
        while True:
            self._sweep()
            self._publish()
            await asyncio.sleep(TICK_S)

    def _publish(self) -> None:
        show(self._metrics, self._name, len(self._held), self._limits.slots, self._watches)
        gauge = self._metrics.set
        for state, (ranges, _) in self._leases.counts().items():
            if state is not State.FREE:
                gauge(catalogue.KV_LEASES, ranges, instance=self._name, state=state.value)
