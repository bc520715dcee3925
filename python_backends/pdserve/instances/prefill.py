"""A prefill instance: accepts or rejects at once, computes, and keeps KV caches until taken.

A request holds a *slot* from acceptance until its KV cache has been transferred, released or has
expired, so that a slow decode shows as rejections here. There is no queue: at most a *batch* of
requests is not computed yet, and they share the next forward. When the running forward is nearly
over, the next batch is admitted, so that the engine goes from one to the other without waiting for
an offer. Gateways that found it busy may watch, and are notified in turn.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal

from pdserve import config, errors
from pdserve.engines.protocol import EngineModel, PrefillEngine, PrefillJob
from pdserve.instances import admission
from pdserve.instances.acceptance import Acceptance, Trials
from pdserve.instances.held_prompt import HeldPrompt
from pdserve.instances.kv_exports import KVExports
from pdserve.instances.prompt_computation import PromptComputation
from pdserve.instances.protocol import RELEASED, Send, Sent, sent_at_once
from pdserve.instances.slot_admission import SlotAdmission
from pdserve.instances.slots import show
from pdserve.instances.ticks import Ticks
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

TICK_S = 0.02
# Interval of checks, while gateways watch, of what decodes have taken: the time in which a free
# slot is noticed. One check takes some 50 us.
LOOK_S = 0.001


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
        self._exports = KVExports(holder, model.layout.planes, limits.kept_s)
        self._slots = SlotAdmission[HeldPrompt](limits.slots, self._places, self._sweep)
        self._trials = Trials()
        self._computation = PromptComputation(
            name,
            engine,
            limits.batch_tokens,
            self._exports,
            metrics,
            self._trials,
            done=self._hand_over,
            end=self._end,
            nearly_over=self._stir,
        )
        self._stirred = asyncio.Event()
        """Set when something is free for watching gateways, or may become free without a further
        call."""
        self._ticks = Ticks(TICK_S, self._tick)
        self._tasks = Background()

    def start(self, sent: Sent = sent_at_once) -> None:
        """Begin to compute and to keep time; called once in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._trials.sent = sent
        self._tasks.start(self._computation.run(), self._ticks.run(), self._attend())

    async def close(self) -> None:
        """Stop, and release the memory; receivers that have mapped it may still read leases."""
        await self._tasks.close()
        self._engine.close()
        failed = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        for held in [held for held in self._slots.held.values() if held.computing]:
            self._end(held, failed)
        self._slots.watches.close(failed)
        self._exports.close()

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""
        return self._model.context_length

    def describe(self, send: Send) -> None:
        """Send how its memory is reached."""
        send(Described(self._exports.holder.endpoint), True)

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
        nbytes, capacity = self._exports.nbytes(len(tokens)), self._exports.capacity
        if nbytes > capacity:
            message = (
                f"the KV cache of {len(tokens)} prompt tokens takes {nbytes} bytes; "
                f"{self._name}'s arena has {capacity}"
            )
            self._slots.reject(request, message, send)
            return
        now = self._loop.time()
        if (refusal := self._slots.refusal(request, now)) is not None:
            send(refusal, True)
            return
        allocated = self._exports.allocate(len(tokens))
        if allocated is None:
            send(Busy("arena"), True)
            return
        leased, kv = allocated
        held = HeldPrompt(
            request=request,
            send=send,
            acceptance=Acceptance(send),
            leased=leased,
            kv=kv,
            job=PrefillJob(tokens, kv.whole, request.sampling, kv.publish, request.resumed_tokens),
            salt=request.salt,
            deadline=now + request.deadline_ms / 1e3,
        )
        self._slots.take(held, now)
        self._ticks.wake()
        if request.layered:
            held.acceptance.say(self._exports.open_early(held))
        else:
            held.acceptance.begin(request.hurry or request.suspect)
        self._computation.add(held)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once when a slot is free for this gateway, which may be now."""
        self._slots.watch(request, stream, send, self._loop.time())
        self._stirred.set()
        self._ticks.wake()

    def release(self, request_id: str, send: Send) -> None:
        """Release whatever is held for the request, or end a watch."""
        self._slots.watches.release(request_id)
        held = self._slots.held.get(request_id)
        if held is not None:
            self._give_up(held, RELEASED)
        send(Released(), True)

    def _give_up(self, held: HeldPrompt, reply: Failed) -> None:
        if held.computing:
            self._computation.give_up(held, reply)
        else:
            self._take_back(held)

    # ---------------------------------------------------------------- assignment

    @property
    def used(self) -> int:
        """Return the number of slots that requests hold."""
        return len(self._slots.held)

    @property
    def leases(self) -> int:
        """Return the number of KV caches that a decode may still read."""
        return self._exports.open

    @property
    def memory(self) -> bytes:
        """Return the epoch of the arena."""
        return self._exports.holder.epoch

    def assign(self, number: int) -> None:
        """Name this assignment in handles and in the endpoint from now on."""
        self._exports.holder.assign(number)

    def end_watches(self, reply: Reply) -> None:
        """End all watches: nothing will become free for them."""
        self._slots.watches.close(reply)

    def end_all(self, failed: Failed) -> None:
        """Give up all requests; KV caches that a decode is pulling are freed after that."""
        for held in list(self._slots.held.values()):
            if not held.given_up:
                self._give_up(held, failed)
        self._ticks.wake()

    def _places(self) -> int:
        """Return the number of further prompts that the next forward has room for."""
        return 0 if self._exports.clogged else self._limits.batch - len(self._computation)

    def _sweep(self, now: float) -> bool:
        """End the leases that are over, and tell whether there may be memory for another prompt."""
        self._end_leases(now)
        return not self._exports.lacks_room()

    # ----------------------------------------------------------------- hand-over

    def _hand_over(self, held: HeldPrompt, token: int, compute_ms: float) -> None:
        """Send the first token of a prompt and the handle of its KV cache."""
        held.acceptance.end()
        held.computing = False
        self._stir()
        handle, stored = self._exports.hand_over(held, token, self._loop.time())
        eos = token in self._model.eos_ids
        held.send(Prefilled(token, eos, handle, held.job.cached, compute_ms, stored), True)

    def _end(self, held: HeldPrompt, reply: Reply) -> None:
        """End a request that has failed or is unwanted before its first token."""
        held.acceptance.end()
        self._take_back(held)
        held.send(reply, True)

    def _take_back(self, held: HeldPrompt) -> None:
        """Free what is held for a request that was transferred, was released, failed or expired."""
        now = self._loop.time()
        self._slots.give_back(held, now)
        self._stir()
        self._exports.leases.give_back(held.leased, now)

    def _end_leases(self, now: float) -> None:
        leases = self._exports.leases
        for held in list(self._slots.held.values()):
            if not held.computing and leases.over(held.leased, now):
                self._take_back(held)
        leases.sweep(now)

    # --------------------------------------------------------------------- time

    def _stir(self) -> None:
        """Wake the task that notifies watching gateways, since something may soon be free."""
        if self._slots.watches:
            self._stirred.set()

    async def _attend(self) -> None:
        """While gateways watch, check every LOOK_S seconds what has ended."""
        while True:
            await self._stirred.wait()
            self._slots.look(self._loop.time())
            watches, quarantined = self._slots.watches, self._exports.leases.quarantined
            lent = any(not held.computing for held in self._slots.held.values())
            if not watches or not (lent or quarantined or watches.kept):
                self._stirred.clear()
            await asyncio.sleep(LOOK_S)

    def _tick(self) -> bool:
        """End leases, and set the metrics; return whether any of that may change by itself."""
        now = self._loop.time()
        self._end_leases(now)
        used, watches = len(self._slots.held), self._slots.watches
        seconds = self._slots.seconds.drain(now)
        show(self._metrics, self._name, used, self._limits.slots, watches, seconds)
        self._exports.show(self._metrics, self._name)
        return bool(used or watches or self._exports.leases.quarantined)
