"""A decode whose engine fetches KV caches and batches by itself; its slots are counted here."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np

from pdserve import config, errors
from pdserve.engines.external import Asked, GenerationEngine, Piece
from pdserve.instances import admission
from pdserve.instances.acceptance import AFTER_S, TRIAL_S, interval_s
from pdserve.instances.decode import TICK_S
from pdserve.instances.external.handle import ExternalEndpoint, ExternalHandle, digest
from pdserve.instances.external.reports import Reports
from pdserve.instances.slot_watches import WATCHED_S, RoomWatches, Send
from pdserve.instances.slots import show
from pdserve.kvcache.handle import unseal
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
    MAX_TOKENS,
    SUSPECT,
    Accepted,
    Busy,
    Connect,
    Connected,
    DecodeRequest,
    Failed,
    NotConnected,
    Released,
    Reply,
    Room,
    Tokens,
    Watch,
)
from pdserve.supervision import Background
from pdserve.transfer.reports import LinkReport, TransferReport

# Rate that is reported for the engine's own link, which is unknown: all pairs count as equal.
UNKNOWN_RATE = 1e12


@dataclass(slots=True, eq=False)
class _Call:
    """A request that has been accepted, until its end."""

    request: DecodeRequest
    send: Send
    began: float
    sent: int
    """Number of tokens of the answer that have been sent, the prefill's first one included."""
    sent_at: float = 0.0
    unsent: list[int] = field(default_factory=list)
    transfer: TransferReport | None = None
    """Report of the KV cache's transfer, until it has been sent."""
    arrived: bool = False
    task: asyncio.Task[Reply] | None = field(default=None, repr=False)
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def on_trial(self) -> bool:
        """Tell whether it is a suspect that has had no token here yet."""
        return self.request.suspect and (not self.arrived or self.transfer is not None)

    def tell(self, reply: Reply, last: bool) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.send(reply, last)


class ExternalDecode:
    """One engine in the decode role. The engine is closed with the instance.

    Args:
        transport: name of the engine's link in ``stats``.
        key: key of the deployment, under which handles are sealed.
    """

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
        self._prefills: dict[bytes, str] = {}
        """Names of the prefills that it is connected to, by epoch."""
        self._watches = RoomWatches(self._room)
        self._reports = Reports(name, engine, metrics)
        self._open: dict[str, _Call] = {}
        self._unwanted = Failed(errors.Cancelled.code, "released")
        """Reply to a request that is given up."""
        self._tasks = Background()

    def start(self) -> None:
        """Begin to keep time; called once in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tasks.start(self._keep_time(), self._reports.run())

    async def close(self) -> None:
        self._unwanted = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        await self._tasks.close()
        tasks = [call.task for call in self._open.values() if call.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watches.close(self._unwanted)
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
        except errors.HandleError as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        former = [epoch for epoch, name in self._prefills.items() if name == holder.name]
        for epoch in former:
            del self._prefills[epoch]
        self._prefills[holder.epoch] = holder.name
        link = LinkReport(self._transport, "", 0.0, UNKNOWN_RATE, {}, False)
        send(Connected(holder.name, link, 0, self._room()), True)

    # ---------------------------------------------------------------- admission

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the tokens."""
        try:
            engine = self._engine
            admission.prompt(request, engine.context_length, engine.vocabulary)
        except errors.InvalidRequest as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        if request.id in self._open:
            send(Failed(errors.InvalidRequest.code, f"request id {request.id} is in use"), True)
            return
        if full := self._full(request):
            self._watches.refused()
            send(Busy(full, self._room()), True)
            return
        link = b""
        if request.handle:
            try:
                handle = unseal(request.handle, ExternalHandle, self._key)
                if handle.epoch not in self._prefills:
                    send(NotConnected(), True)
                    return
                if handle.prompt != digest(request.prompt):
                    raise errors.HandleError("the handle is of another prompt")
                if not handle.link:
                    raise errors.HandleError("the prefill has kept nothing")
            except errors.HandleError as error:
                send(Failed(error.code, f"{self._name}: {error}"), True)
                return
            link = handle.link
        now = self._loop.time()
        call = _Call(request, send, now, 0 if request.first_token is None else 1, now)
        self._open[request.id] = call
        if request.suspect or request.hurry:
            self._accept(call)
        else:
            call.timer = self._loop.call_later(AFTER_S, self._accept, call)
        call.task = asyncio.create_task(self._run(call, link))
        call.task.add_done_callback(partial(self._ended, call))

    def _accept(self, call: _Call) -> None:
        call.send(Accepted(room=self._room()), False)

    def _room(self) -> Room:
        """Return the free slots.

        The engine manages its blocks itself, so their number is not limited.
        """
        return Room(self._limits.slots - len(self._open), MAX_TOKENS)

    def _full(self, request: DecodeRequest) -> str:
        """Return the resource that is exhausted; empty: none."""
        if len(self._open) >= self._limits.slots:
            return "slots"
        on_trial = request.suspect and any(call.on_trial for call in self._open.values())
        return SUSPECT if on_trial else ""

    def release(self, request_id: str, send: Send) -> None:
        """Give up a request."""
        call = self._open.get(request_id)
        if call is not None:
            assert call.task is not None
            call.task.cancel()
        self._watches.release(request_id)
        send(Released(), True)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once that a request has ended since; at once if none is open."""
        used, slots = len(self._open), self._limits.slots
        self._watches.wait(request, stream, send, used, slots, self._loop.time())
        self._loop.call_later(WATCHED_S, self._watches.release, request.id)

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
        )
        try:
            if request.suspect:
                await asyncio.sleep(TRIAL_S)
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

    def _ended(self, call: _Call, task: asyncio.Task[Reply]) -> None:
        del self._open[call.request.id]
        # It may have been cancelled before its first step, where no handler in it runs.
        if task.cancelled():
            reply: Reply = self._unwanted
        elif error := task.exception():
            reply = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        else:
            reply = task.result()
        if isinstance(reply, Tokens):
            reply = msgspec.structs.replace(reply, room=self._room())
        call.tell(reply, True)
        self._watches.ended(self._loop.time())

    def _append(self, call: _Call, piece: Piece) -> Tokens | None:
        """Add new tokens to the answer; return the last reply if they end it."""
        request, now = call.request, self._loop.time()
        if not call.arrived:
            call.arrived = True
            first = (
                next(iter(piece.ids), -1) if request.first_token is None else request.first_token
            )
            ms = (now - call.began) * 1e3
            call.transfer = TransferReport(0, self._transport, "engine", ms, ms, 0.0, first)
        call.unsent += piece.ids
        quiet = now - call.sent_at < interval_s(self._limits, len(self._open), request)
        # The reply that frees the prefill's slot is not delayed.
        if quiet and not piece.finish_reason and call.transfer is None:
            return None
        ids = np.array(call.unsent, "<i4").tobytes()
        room = self._room() if call.transfer is not None and not piece.finish_reason else None
        reply = Tokens(call.sent, ids, piece.finish_reason, call.transfer, room)
        if call.on_trial:
            self._watches.ended(now)  # another suspect may be tried
        call.sent += len(call.unsent)
        call.sent_at, call.unsent, call.transfer = now, [], None
        if piece.finish_reason:
            return reply
        call.tell(reply, False)
        return None

    async def _keep_time(self) -> None:
        while True:
            used, slots = len(self._open), self._limits.slots
            show(self._metrics, self._name, used, slots, self._watches)
            await asyncio.sleep(TICK_S)
