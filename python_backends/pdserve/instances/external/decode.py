"""A decode whose engine fetches KV caches and batches by itself; its slots are counted here."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from pdserve import config, errors
from pdserve.engines.external import Asked, GenerationEngine, Piece
from pdserve.instances import admission
from pdserve.instances.acceptance import Trials, interval_s
from pdserve.instances.accepted_call import AcceptedCall
from pdserve.instances.decode import TICK_S
from pdserve.instances.external.cancelling import cancelled
from pdserve.instances.external.handle import ExternalEndpoint, ExternalHandle, digest
from pdserve.instances.external.reports import Reports
from pdserve.instances.protocol import RELEASED, Send, Sent, sent_at_once
from pdserve.instances.room_admission import RoomAdmission
from pdserve.instances.slots import TimeIntegral, show
from pdserve.instances.ticks import Ticks
from pdserve.kvcache.handle import unseal
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
    MAX_TOKENS,
    Connect,
    Connected,
    DecodeRequest,
    Failed,
    NotConnected,
    Released,
    Reply,
    Tokens,
    Unlink,
    Unlinked,
    Watch,
)
from pdserve.supervision import Background
from pdserve.transfer.reports import LinkReport, TransferReport

# Rate that is reported for the engine's own link, which is unknown: all pairs count as equal.
UNKNOWN_RATE = 1e12


@dataclass(slots=True, eq=False)
class _Call(AcceptedCall):
    """An accepted request with the task that serves it."""

    began: float
    sent: int
    """Number of tokens of the answer that have been sent, the prefill's first one included."""
    task: asyncio.Task[Reply] | None = field(default=None, repr=False, kw_only=True)
    given_up: bool = field(default=False, kw_only=True)
    """True if the last reply was sent, though the engine has not let go of the request yet."""

    def tell(self, reply: Reply, last: bool) -> None:
        if not self.given_up:
            AcceptedCall.tell(self, reply, last)


class ExternalDecode:
    """One engine in the decode role. The engine is closed with the instance.

    Args:
        transport: name of the engine's link in ``stats``.
        key: key of the deployment, under which handles are sealed.
    """

    role: ClassVar[Literal["decode"]] = "decode"

    def __init__(
        self,
        name: str,
        engine: GenerationEngine,
        transport: str,
        limits: config.Decode,
        key: bytes,
        metrics: Registry,
    ) -> None:
        self._name = name
        self._engine = engine
        self._transport = transport
        self._limits = limits
        self._key = key
        self._metrics = metrics
        self._prefills: dict[bytes, ExternalEndpoint] = {}
        """The prefills that it is connected to, by epoch."""
        # The engine manages its blocks itself, so their number is not limited.
        self._admission = RoomAdmission[_Call](limits, lambda: MAX_TOKENS)
        self._busy = TimeIntegral()
        self._reports = Reports(name, engine, metrics)
        self._trials = Trials()
        self._unwanted = RELEASED
        """Reply to a request that is given up."""
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
        await cancelled([call.task for call in self._admission.open.values() if call.task])
        self._admission.watches.close(self._unwanted)
        await self._engine.close()

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""
        return self._engine.context_length

    def connect(self, request: Connect, send: Send) -> None:
        """Connect to a prefill: check that its KV caches can be used here."""
        try:
            holder = unseal(request.endpoint, ExternalEndpoint, self._key)
            if holder.fingerprint != self._engine.fingerprint:
                raise errors.HandleError(
                    f"{holder.name} is {holder.fingerprint}; this instance "
                    f"{self._engine.fingerprint}"
                )
            known = self._prefills.get(holder.epoch)
            if known is not None and known.number > holder.number:
                raise errors.HandleError(
                    f"{holder.name} has assignment {known.number}, not {holder.number} any more"
                )
        except errors.HandleError as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        former = [epoch for epoch, one in self._prefills.items() if one.name == holder.name]
        for epoch in former:
            del self._prefills[epoch]
        self._prefills[holder.epoch] = holder
        link = LinkReport(self._transport, "", 0.0, UNKNOWN_RATE, {}, False)
        send(Connected(holder.name, link, 0, self._admission.room()), True)

    # ---------------------------------------------------------------- admission

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the tokens."""
        try:
            engine = self._engine
            admission.prompt(request, engine.context_length, engine.vocabulary)
        except errors.InvalidRequest as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        if (refusal := self._admission.refusal(request)) is not None:
            send(refusal, True)
            return
        link = b""
        if request.handle:
            try:
                handle = unseal(request.handle, ExternalHandle, self._key)
                prefill = self._prefills.get(handle.epoch)
                if prefill is None or prefill.number < handle.number:
                    send(NotConnected(), True)
                    return
                if prefill.number != handle.number:
                    raise errors.HandleError(
                        f"the handle is of assignment {handle.number} of {prefill.name}, "
                        f"which has {prefill.number}"
                    )
                if handle.prompt != digest(request.prompt):
                    raise errors.HandleError("the handle is of another prompt")
                if not handle.link:
                    raise errors.HandleError("the prefill has kept nothing")
            except errors.HandleError as error:
                send(Failed(error.code, f"{self._name}: {error}"), True)
                return
            link = handle.link
        now = self._loop.time()
        sent = 0 if request.first_token is None else 1
        call = _Call(request, send, now, sent, sent_at=now)
        self._admission.take_in(call, now)
        self._busy.change(1, now)
        self._ticks.wake()
        call.task = asyncio.create_task(self._run(call, link))
        call.task.add_done_callback(partial(self._ended, call))

    def release(self, request_id: str, send: Send) -> None:
        """Give up a request; its slot is free when the engine's call has ended."""
        call = self._admission.open.get(request_id)
        if call is not None:
            # The reply comes after that to the release.
            self._loop.call_soon(self._give_up, call, self._unwanted)
        self._admission.watches.release(request_id)
        send(Released(), True)

    @property
    def used(self) -> int:
        """Return the number of slots that requests hold."""
        return len(self._admission.open)

    @property
    def leases(self) -> int:
        """Return 0: a decode lends no KV cache."""
        return 0

    @property
    def memory(self) -> bytes:
        """Return nothing: no other instance links to a decode's pool."""
        return b""

    def assign(self, number: int) -> None:
        """Do nothing: a decode makes no handles."""

    def end_watches(self, reply: Reply) -> None:
        """End all watches: there will be no room for them."""
        self._admission.watches.close(reply)

    def end_all(self, failed: Failed) -> None:
        """Give up all requests; their slots are free when the engine's calls have ended."""
        for call in list(self._admission.open.values()):
            self._give_up(call, failed)

    def unlink(self, request: Unlink, send: Send) -> None:
        """Forget a prefill; the engine's own links are not known here."""
        known = self._prefills.get(request.epoch)
        if known is not None and known.number <= request.number:
            del self._prefills[request.epoch]
        send(Unlinked(), True)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once that a request has ended since; at once if none is open."""
        self._admission.watch(request, stream, send, self._loop.time())
        self._ticks.wake()

    # ------------------------------------------------------------------- decode

    async def _run(self, call: _Call, link: bytes) -> Reply:
        """Send tokens as they come; return the last reply."""
        request = call.request
        asked = Asked(
            prompt=np.frombuffer(request.prompt, "<i4"),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            ignore_eos=request.ignore_eos,
            resumed_tokens=request.resumed_tokens,
            salt=request.salt,
        )
        try:
            if request.suspect:
                await self._trials.begun()
            answer = self._engine.generate(asked, request.first_token, link)
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    ended = self._append(call, piece)
                    if ended is not None:
                        return ended
        except errors.PDServeError as error:
            return Failed(error.code, f"{self._name}: {error}")
        except Exception as error:  # one failed answer may not end the instance
            return Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        return Failed(errors.InstanceError.code, f"{self._name}: the answer has no end")

    def _give_up(self, call: _Call, reply: Failed) -> None:
        assert call.task is not None
        if not call.given_up and not call.task.done():
            call.tell(reply, True)
            call.given_up = True
            call.task.cancel()

    def _ended(self, call: _Call, task: asyncio.Task[Reply]) -> None:
        # It may have been cancelled before its first step, where no handler in it runs.
        if task.cancelled():
            reply: Reply = self._unwanted
        elif error := task.exception():
            reply = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        else:
            reply = task.result()
        now = self._loop.time()
        if isinstance(reply, Tokens) and call.arrived_at is not None:
            self._metrics.observe(catalogue.DECODE, now - call.arrived_at, instance=self._name)
        self._admission.end(call, reply, now)
        self._busy.change(min(1, len(self._admission.open)), now)

    def _append(self, call: _Call, piece: Piece) -> Tokens | None:
        """Add new tokens to the answer; return the last reply if they end it."""
        request, now = call.request, self._loop.time()
        if not call.arrived:
            call.arrived_at = now
            first = (
                next(iter(piece.ids), -1) if request.first_token is None else request.first_token
            )
            ms = (now - call.began) * 1e3
            call.transfer = TransferReport(0, self._transport, "engine", ms, ms, 0.0, first)
        call.unsent += piece.ids
        quiet = now - call.sent_at < interval_s(self._limits, len(self._admission.open), request)
        # The reply that frees the prefill's slot is not delayed.
        if quiet and not piece.finish_reason and call.transfer is None:
            return None
        reply = self._admission.tokens(call, call.sent, piece.finish_reason)
        if piece.finish_reason:
            return reply
        call.sent += len(call.unsent)
        self._admission.tell(call, reply, now)
        return None

    def _tick(self) -> bool:
        """Set the metrics; return whether they may change by themselves."""
        used, watches = len(self._admission.open), self._admission.watches
        now = self._loop.time()
        seconds, busy = self._admission.seconds.drain(now), self._busy.drain(now)
        show(self._metrics, self._name, used, self._limits.slots, watches, seconds, busy)
        return bool(used or watches)
