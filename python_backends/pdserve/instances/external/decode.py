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
    DecodeRequest,
    Failed,
    Join,
    Joined,
    Released,
    Reply,
    Room,
    Stranger,
    Tokens,
    Watch,
)
from pdserve.supervision import Background
from pdserve.transfer.reports import Met, Pulled

# Nothing is known of the engine's own link: all pairs are alike to who chooses among them.
UNKNOWN_RATE = 1e12


@dataclass(slots=True, eq=False)
class _Opened:
    """A request that has been accepted, until its end."""

    request: DecodeRequest
    send: Send
    began: float
    sent: int
    """Tokens of the answer that have been told, the prefill's first one included."""
    sent_at: float = 0.0
    unsent: list[int] = field(default_factory=list)
    pulled: Pulled | None = None
    """How the KV cache came, until it has been told."""
    arrived: bool = False
    task: asyncio.Task[Reply] | None = field(default=None, repr=False)
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def on_trial(self) -> bool:
        """It may end this instance, and has had no token here yet."""
        return self.request.suspect and (not self.arrived or self.pulled is not None)

    def tell(self, reply: Reply, last: bool) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.send(reply, last)


class ExternalDecode:
    """One engine in the decode role. Closed with the instance.

    Args:
        transport: what the engine's link is called in ``stats``.
        key: of the deployment, under which handles are sealed.
        peers: decodes that a gateway spreads its streams over.
    """

    def __init__(
        self,
        name: str,
        engine: GenerationEngine,
        transport: str,
        limits: config.Decode,
        key: bytes,
        peers: int,
        metrics: Registry,
    ) -> None:
        self._name = name
        self._engine = engine
        self._transport = transport
        self._limits = limits
        self._key = key
        self._peers = peers
        self._metrics = metrics
        self._met: dict[bytes, str] = {}
        """Prefills by epoch."""
        self._watches = RoomWatches(self._room)
        self._reports = Reports(name, engine, metrics)
        self._open: dict[str, _Opened] = {}
        self._unwanted = Failed(errors.Cancelled.code, "released")
        """What is said of an answer that is given up."""
        self._tasks = Background()

    def start(self) -> None:
        """Begin to keep time; called once in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tasks.start(self._keep_time(), self._reports.run())

    async def close(self) -> None:
        self._unwanted = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        await self._tasks.close()
        tasks = [opened.task for opened in self._open.values() if opened.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watches.close(self._unwanted)
        await self._engine.close()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._engine.context_length

    def join(self, request: Join, send: Send) -> None:
        """Meet a prefill: make sure that its KV caches are of use here."""
        try:
            holder = unseal(request.description, ExternalEndpoint, self._key)
            if holder.fingerprint != self._engine.fingerprint:
                raise errors.HandleError(
                    f"{holder.name} is {holder.fingerprint}; this instance "
                    f"{self._engine.fingerprint}"
                )
        except errors.HandleError as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        former = [epoch for epoch, name in self._met.items() if name == holder.name]
        for epoch in former:
            del self._met[epoch]
        self._met[holder.epoch] = holder.name
        met = Met(self._transport, "", 0.0, UNKNOWN_RATE, {}, False)
        send(Joined(holder.name, met, 0, self._room()), True)

    # ---------------------------------------------------------------- admission

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject, at once; ``send`` gets the rejection or, later, the tokens."""
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
                if handle.epoch not in self._met:
                    send(Stranger(), True)
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
        opened = _Opened(request, send, now, 0 if request.first_token is None else 1, now)
        self._open[request.id] = opened
        if request.suspect or request.hurry:
            self._accept(opened)
        else:
            opened.timer = self._loop.call_later(AFTER_S, self._accept, opened)
        opened.task = asyncio.create_task(self._run(opened, link))
        opened.task.add_done_callback(partial(self._ended, opened))

    def _accept(self, opened: _Opened) -> None:
        opened.send(Accepted(room=self._room()), False)

    def _room(self) -> Room:
        """Blocks are the engine's own matter."""
        return Room(self._limits.slots - len(self._open), MAX_TOKENS)

    def _full(self, request: DecodeRequest) -> str:
        """What there is no room for; empty: there is."""
        if len(self._open) >= self._limits.slots:
            return "slots"
        on_trial = request.suspect and any(opened.on_trial for opened in self._open.values())
        return SUSPECT if on_trial else ""

    def release(self, request_id: str, send: Send) -> None:
        """Nobody wants the tokens any more."""
        opened = self._open.get(request_id)
        if opened is not None:
            assert opened.task is not None
            opened.task.cancel()
        self._watches.release(request_id)
        send(Released(), True)

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Say once that a request has ended since; at once if there is none."""
        used, slots = len(self._open), self._limits.slots
        self._watches.wait(request, stream, send, used, slots, self._loop.time())
        self._loop.call_later(WATCHED_S, self._watches.release, request.id)

    # ------------------------------------------------------------------- decode

    async def _run(self, opened: _Opened, link: bytes) -> Reply:
        """Tell tokens as they come; the last reply."""
        request = opened.request
        asked = Asked(
            prompt=np.frombuffer(request.prompt, "<i4"),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            ignore_eos=request.ignore_eos,
            outputs=request.outputs,
        )
        try:
            if request.suspect:
                await asyncio.sleep(TRIAL_S)
            answer = self._engine.generate(asked, request.first_token, link)
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    ended = self._append(opened, piece)
                    if ended is not None:
                        return ended
        except errors.PDServeError as error:
            return Failed(error.code, f"{self._name}: {error}")
        except Exception as error:  # one bad answer may not end the instance
            return Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        return Failed(errors.InstanceError.code, f"{self._name}: the answer has no end")

    def _ended(self, opened: _Opened, task: asyncio.Task[Reply]) -> None:
        del self._open[opened.request.id]
        # Cancelled before its first step, perhaps: nothing in it would know.
        if task.cancelled():
            reply: Reply = self._unwanted
        elif error := task.exception():
            reply = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
        else:
            reply = task.result()
        if isinstance(reply, Tokens):
            reply = msgspec.structs.replace(reply, room=self._room())
        opened.tell(reply, True)
        self._watches.ended(self._loop.time())

    def _append(self, opened: _Opened, piece: Piece) -> Tokens | None:
        """Take in new tokens; the last reply, if they end the answer."""
        request, now = opened.request, self._loop.time()
        if not opened.arrived:
            opened.arrived = True
            first = (
                next(iter(piece.ids), -1) if request.first_token is None else request.first_token
            )
            ms = (now - opened.began) * 1e3
            opened.pulled = Pulled(0, self._transport, "engine", ms, ms, 0.0, first)
        opened.unsent += piece.ids
        interval = interval_s(self._limits, len(self._open), self._peers)
        quiet = now - opened.sent_at < max(interval, request.min_interval_ms / 1e3)
        # What frees the prefill's slot does not wait.
        if quiet and not piece.finish_reason and opened.pulled is None:
            return None
        ids = np.array(opened.unsent, "<i4").tobytes()
        room = self._room() if opened.pulled is not None and not piece.finish_reason else None
        reply = Tokens(opened.sent, ids, piece.finish_reason, opened.pulled, room)
        if opened.on_trial:
            self._watches.ended(now)  # another one may be tried
        opened.sent += len(opened.unsent)
        opened.sent_at, opened.unsent, opened.pulled = now, [], None
        if piece.finish_reason:
            return reply
        opened.tell(reply, False)
        return None

    async def _keep_time(self) -> None:
        while True:
            used, slots = len(self._open), self._limits.slots
            show(self._metrics, self._name, used, slots, self._watches)
            await asyncio.sleep(TICK_S)
