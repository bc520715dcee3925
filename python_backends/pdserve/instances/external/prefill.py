"""A prefill whose engine queues, batches and keeps KV caches by itself.

This module counts slots for the engine, which would take any number of requests and never report
that it is busy. A request holds a slot:

    submit ──► COMPUTING ──► WAITING ──────────► over   a decode has taken the KV cache
        release,  │             │ release
        time-out  ▼             ▼
              ANSWERED ─────► PINNED ──────────► over   the engine has let go of it by itself
                  │
                  └──────────────────────────► over   the engine's call has ended with nothing kept

The engine offers no way to free a KV cache that no decode fetches; it does so after ``keeps_s``.
Until then the slot stays taken, so that an accepted request always finds memory. A request that is
given up while the engine computes is answered at once, but keeps its slot until the engine's call
has ended, which may be later: see ``ContextEngine``.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from pdserve import config, errors
from pdserve.control.assignment import FIRST
from pdserve.engines.external import Asked, Context, ContextEngine
from pdserve.instances import admission
from pdserve.instances.acceptance import Acceptance, Trials
from pdserve.instances.external.cancelling import cancelled
from pdserve.instances.external.handle import ExternalEndpoint, ExternalHandle, digest
from pdserve.instances.external.reports import Reports
from pdserve.instances.prefill import TICK_S
from pdserve.instances.protocol import RELEASED, Send, Sent, sent_at_once
from pdserve.instances.slot_admission import SlotAdmission
from pdserve.instances.slots import TimeIntegral, show
from pdserve.instances.ticks import Ticks
from pdserve.kvcache.handle import EPOCH_BYTES, seal
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
    Described,
    Failed,
    Prefilled,
    PrefillRequest,
    Released,
    Reply,
    Watch,
)
from pdserve.supervision import Background


class Phase(Enum):
    COMPUTING = "computing"
    ANSWERED = "answered"
    WAITING = "waiting"
    PINNED = "pinned"


@dataclass(slots=True, eq=False)
class _Held:
    """A request that holds a slot."""

    request: PrefillRequest
    send: Send
    acceptance: Acceptance
    began: float
    phase: Phase = Phase.COMPUTING
    until: float = 0.0
    """Time at which the engine frees the KV cache by itself."""
    task: asyncio.Task[Context] | None = field(default=None, repr=False)
    limit: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def computing(self) -> bool:
        """Tell whether its first token is not known yet."""
        return self.phase in (Phase.COMPUTING, Phase.ANSWERED)


class ExternalPrefill:
    """One engine in the prefill role. The engine is closed with the instance.

    Args:
        key: key of the deployment, under which handles are sealed.
    """

    role: ClassVar[Literal["prefill"]] = "prefill"

    def __init__(
        self,
        name: str,
        engine: ContextEngine,
        limits: config.Prefill,
        key: bytes,
        metrics: Registry,
    ) -> None:
        self._name = name
        self._engine = engine
        self._limits = limits
        self._key = key
        self._metrics = metrics
        self._epoch = secrets.token_bytes(EPOCH_BYTES)
        self._number = FIRST
        self._slots = SlotAdmission[_Held](limits.slots, self._places, self._sweep)
        self._busy = TimeIntegral()
        self._reports = Reports(name, engine, metrics)
        self._trials = Trials()
        self._unwanted: Reply = RELEASED
        """Reply to a prompt that is given up."""
        self._ticks = Ticks(TICK_S, self._tick)
        self._tasks = Background()

    def start(self, sent: Sent = sent_at_once) -> None:
        """Begin to keep time; called once in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._trials.sent = sent
        self._tasks.start(self._ticks.run(), self._reports.run())

    async def close(self) -> None:
        self._unwanted = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        await self._tasks.close()
        await cancelled([held.task for held in self._slots.held.values() if held.task])
        self._slots.watches.close(self._unwanted)
        await self._engine.close()

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""
        return self._engine.context_length

    def describe(self, send: Send) -> None:
        """Send the prefill's name and epoch; how its memory is reached is up to the engine."""
        described = ExternalEndpoint(
            name=self._name,
            epoch=self._epoch,
            number=self._number,
            fingerprint=self._engine.fingerprint,
        )
        send(Described(seal(described, self._key)), True)

    # ---------------------------------------------------------------- admission

    def submit(self, request: PrefillRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the result."""
        try:
            engine = self._engine
            admission.prompt(request, engine.context_length, engine.vocabulary)
        except errors.InvalidRequest as error:
            self._slots.reject(request, f"{self._name}: {error}", send)
            return
        now = self._loop.time()
        if (refusal := self._slots.refusal(request, now)) is not None:
            send(refusal, True)
            return
        held = _Held(request, send, Acceptance(send), now)
        self._slots.take(held, now)
        self._busy.change(1, now)
        self._ticks.wake()
        held.acceptance.begin(request.hurry or request.suspect)
        held.task = asyncio.create_task(self._compute(held.request))
        held.task.add_done_callback(partial(self._computed, held))
        # Otherwise a gateway, told again and again that it is being computed, would wait for ever.
        late = Failed(errors.Unavailable.code, f"{self._name}: no first token within its limit")
        held.limit = self._loop.call_later(request.deadline_ms / 1e3, self._give_up, held, late)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once when a slot is free for this gateway, which may be now."""
        self._slots.watch(request, stream, send, self._loop.time())
        self._ticks.wake()

    def _places(self) -> int:
        """Return the number of further prompts that may be computed at once."""
        return self._limits.batch - self._computing

    @property
    def _computing(self) -> int:
        return sum(held.computing for held in self._slots.held.values())

    def _sweep(self, now: float) -> bool:
        """End what the engine has freed by itself; it always finds memory for another prompt."""
        for held in list(self._slots.held.values()):
            if not held.computing and now >= held.until:
                self._slots.give_back(held, now)
        return True

    def release(self, request_id: str, send: Send) -> None:
        """Release whatever is held for the request, or end a watch."""
        self._slots.watches.release(request_id)
        held = self._slots.held.get(request_id)
        if held is not None and held.computing:
            # The reply comes after that to the release.
            self._loop.call_soon(self._give_up, held, self._unwanted)
        elif held is not None:
            held.phase = Phase.PINNED
        self._slots.look(self._loop.time())
        send(Released(), True)

    @property
    def used(self) -> int:
        """Return the number of slots that requests hold."""
        return len(self._slots.held)

    @property
    def leases(self) -> int:
        """Return the number of KV caches that the engine keeps for decodes."""
        return sum(not held.computing for held in self._slots.held.values())

    @property
    def memory(self) -> bytes:
        """Return the epoch under which decodes know the engine."""
        return self._epoch

    def assign(self, number: int) -> None:
        """Name this assignment in handles and in the endpoint from now on."""
        self._number = number

    def end_watches(self, reply: Reply) -> None:
        """End all watches: nothing will become free for them."""
        self._slots.watches.close(reply)

    def end_all(self, failed: Failed) -> None:
        """Give up all requests; the engine frees by itself what no decode has fetched."""
        for held in list(self._slots.held.values()):
            self._give_up(held, failed)

    def transferred(self, request_id: str, send: Send) -> None:
        """Note that a decode has the KV cache."""
        held, now = self._slots.held.get(request_id), self._loop.time()
        if held is not None and held.phase is Phase.WAITING:
            self._slots.give_back(held, now)
        self._slots.look(now)
        send(Released(), True)

    # ------------------------------------------------------------------ compute

    async def _compute(self, request: PrefillRequest) -> Context:
        asked = Asked(
            prompt=np.frombuffer(request.prompt, "<i4"),
            sampling=request.sampling,
            max_tokens=1,
            ignore_eos=request.ignore_eos,
            resumed_tokens=request.resumed_tokens,
            salt=request.salt,
        )
        if request.suspect:
            await self._trials.begun()
        return await self._engine.context(asked, keep=not request.only)

    def _give_up(self, held: _Held, reply: Reply) -> None:
        """Answer a request whose first token nobody wants any more; cancel the engine's call."""
        if held.phase is Phase.COMPUTING:
            assert held.task is not None
            held.phase = Phase.ANSWERED
            self._answer(held, reply)
            held.task.cancel()
        elif held.phase is Phase.WAITING:
            held.phase = Phase.PINNED

    def _answer(self, held: _Held, reply: Reply) -> None:
        """Send the last reply."""
        held.acceptance.end()
        if held.limit is not None:
            held.limit.cancel()
        held.send(reply, True)

    def _computed(self, held: _Held, task: asyncio.Task[Context]) -> None:
        """Answer a request, unless it was given up, and count what the engine keeps of it."""
        now, link, reply = self._loop.time(), b"", self._unwanted
        if task.cancelled():  # perhaps before its first step, where no handler in it runs
            pass
        elif isinstance(error := task.exception(), errors.PDServeError):
            reply = Failed(error.code, f"{self._name}: {error}")
        elif error is not None:  # one failed prompt may not end the instance
            reply = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        else:
            context = task.result()
            link, reply = context.link, self._prefilled(held, context, now)
        given_up = held.phase is Phase.ANSWERED
        if link:
            held.phase = Phase.PINNED if given_up else Phase.WAITING
            held.until = now + self._engine.keeps_s
        else:
            self._slots.give_back(held, now)
        self._busy.change(min(1, self._computing), now)
        if not given_up:
            self._answer(held, reply)
        self._slots.look(now)

    def _prefilled(self, held: _Held, context: Context, now: float) -> Prefilled:
        handle = ExternalHandle(
            epoch=self._epoch,
            number=self._number,
            prompt=digest(held.request.prompt),
            link=context.link,
        )
        self._metrics.add(catalogue.STEPS, 1, instance=self._name)
        seconds = now - held.began
        self._metrics.observe(catalogue.PREFILL, seconds, instance=self._name)
        return Prefilled(
            context.token,
            context.eos,
            seal(handle, self._key),
            context.cached,
            seconds * 1e3,
            unseen=True,
        )

    def _tick(self) -> bool:
        """End what is over, and set the metrics; return whether that may change by itself."""
        now = self._loop.time()
        self._slots.look(now)
        used, watches = len(self._slots.held), self._slots.watches
        seconds, busy = self._slots.seconds.drain(now), self._busy.drain(now)
        show(self._metrics, self._name, used, self._limits.slots, watches, seconds, busy)
        phases = [held.phase for held in self._slots.held.values()]
        for phase in Phase:
            count = phases.count(phase)
            self._metrics.set(catalogue.KV_LEASES, count, instance=self._name, state=phase.value)
        return bool(used or watches)
