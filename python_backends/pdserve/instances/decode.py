"""A decode instance: reserves at once, pulls the KV cache, and decodes in one running batch.

Blocks for the prompt and the longest answer are reserved on acceptance, so that an accepted request
never waits for memory again. Requests join and leave the batch between two steps. Their blocks stay
cached until they are needed: of a prompt with a cached prefix only the tail is pulled. The prompt
of a request without a KV cache is computed here, between two steps.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from pdserve import config, errors, pools
from pdserve.engines.protocol import DecodeEngine, DecodeSequence, EngineModel
from pdserve.instances import admission
from pdserve.instances.acceptance import Trials
from pdserve.instances.accepted_call import ReservedCall
from pdserve.instances.kv_imports import KVImports, Threads
from pdserve.instances.local_prefill import LocalPrefill
from pdserve.instances.protocol import RELEASED, Send, Sent, sent_at_once
from pdserve.instances.room_admission import RoomAdmission
from pdserve.instances.running_batch import RunningBatch
from pdserve.instances.slots import show
from pdserve.instances.ticks import Ticks
from pdserve.kvcache.block_manager import BlockManager
from pdserve.kvcache.handle import KVHandle
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import (
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
from pdserve.transfer.consumer import peers
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.protocol import Stuck
from pdserve.transfer.reports import LinkReport, TransferReport

TICK_S = 0.1
# Connects in progress, which run one after another; every gateway asks for each of its pairs.
MAX_CONNECTING = 1024


class DecodeInstance:
    """One engine in the decode role. Only larger pulls run outside the event loop.

    Args:
        receiver: pulls into the engine's pool; closed with the instance.
        pulls: number of pulls that run at the same time.
        turn_tokens: maximum tokens of prompts that it computes itself between two steps.
        threads: makes the pools of threads that pull.
    """

    role: ClassVar[Literal["decode"]] = "decode"

    def __init__(
        self,
        name: str,
        model: EngineModel,
        engine: DecodeEngine,
        limits: config.Decode,
        receiver: Receiver,
        pulls: int,
        turn_tokens: int,
        metrics: Registry,
        threads: Threads = pools.started,
    ) -> None:
        self._name = name
        self._model = model
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._blocks = BlockManager(limits.blocks, limits.block_size)
        self._capacity = limits.blocks * limits.block_size
        self._kv_imports = KVImports(name, engine, receiver, pulls, metrics, threads)
        self._local_prefill = LocalPrefill(name, engine, turn_tokens, metrics, self._arrived)
        self._trials = Trials()
        self._admission = RoomAdmission[ReservedCall](limits, self._free_blocks)
        self._connecting = 0
        self._batch = RunningBatch(
            name,
            model,
            engine,
            limits,
            self._admission,
            self._local_prefill,
            metrics,
            end=self._end,
        )
        self._ticks = Ticks(TICK_S, self._tick)
        self._tasks = Background()

    def start(self, sent: Sent = sent_at_once) -> None:
        """Begin to decode and to keep time; called once in the running loop."""
        # An event loop's clock is CLOCK_MONOTONIC, which leases and handles use, too.
        self._loop = asyncio.get_running_loop()
        self._trials.sent = sent
        self._tasks.start(self._batch.run(), self._ticks.run())

    async def close(self) -> None:
        await self._tasks.close()
        await self._kv_imports.close()
        self._engine.close()
        failed = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
        self._admission.watches.close(failed)
        for call in list(self._admission.open.values()):
            self._end(call, failed)

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""
        return self._model.context_length

    # ---------------------------------------------------------------- admission

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject at once; ``send`` gets the rejection or, later, the tokens."""
        try:
            model = self._model
            prompt = admission.prompt(request, model.context_length, model.vocabulary)
        except errors.InvalidRequest as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        length = len(prompt) + request.max_tokens
        if length > self._capacity:
            message = (
                f"{len(prompt)} prompt tokens and max_tokens {request.max_tokens} need more than "
                f"the {self._capacity} tokens that {self._name}'s blocks hold"
            )
            send(Failed(errors.InvalidRequest.code, message), True)
            return
        if (refusal := self._admission.refusal(request)) is not None:
            send(refusal, True)
            return
        if not request.handle and self._local_prefill.full:
            send(self._admission.busy("prompts"), True)
            return
        try:
            handle = self._kv_imports.open(request.handle, len(prompt)) if request.handle else None
        except peers.NoLink:
            send(NotConnected(), True)
            return
        except errors.HandleError as error:
            send(Failed(error.code, f"{self._name}: {error}"), True)
            return
        # A prompt computed together with others has different bits.
        salt = None if request.sampling.reproducible else request.tenant
        reserved = self._blocks.reserve(prompt, length, salt)
        if reserved is None:
            send(self._admission.busy("blocks"), True)
            return
        sequence = DecodeSequence(
            prompt=prompt,
            tokens=[] if request.first_token is None else [request.first_token],
            runs=list(reserved.table.runs),
            sampling=request.sampling,
            cached=reserved.held,
            resumed_tokens=request.resumed_tokens,
        )
        call = ReservedCall(request, send, reserved, sequence)
        self._admission.take_in(call, self._loop.time())
        self._ticks.wake()
        if request.suspect:
            self._trials.begin(partial(self._try, call, handle))
        else:
            self._begin(call, handle)

    def _try(self, call: ReservedCall, handle: KVHandle | None) -> None:
        if self._admission.open.get(call.request.id) is call:  # else the instance has been closed
            self._begin(call, handle)

    def _begin(self, call: ReservedCall, handle: KVHandle | None) -> None:
        if handle is not None:
            done = partial(self._arrived, call)
            self._kv_imports.pull(handle, call.reserved, call.sequence, done)
        else:
            call.sent_at = self._loop.time()
            self._local_prefill.add(call)
            self._batch.wake()

    def release(self, request_id: str, send: Send) -> None:
        """Give up a request; what a step or a pull still uses is freed after it."""
        call = self._admission.open.get(request_id)
        if call is not None:
            call.given_up = call.given_up or RELEASED
            self._batch.wake()
        self._admission.watches.release(request_id)
        send(Released(), True)

    # ---------------------------------------------------------------- assignment

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
        """Give up all requests; what a step or a pull still uses is freed after it."""
        for call in self._admission.open.values():
            call.given_up = call.given_up or failed
        self._batch.wake()

    def watch(self, request: Watch, stream: str, send: Send) -> None:
        """Report once that a request has ended since; at once if none is open."""
        self._admission.watch(request, stream, send, self._loop.time())
        self._ticks.wake()

    def _free_blocks(self) -> int:
        """Return the number of blocks that are free or can be evicted."""
        return self._blocks.pool.free_blocks + self._blocks.pool.cached_blocks

    # ----------------------------------------------------------------- transfer

    def connect(self, request: Connect, send: Send) -> None:
        """Connect to a prefill; ``send`` gets how it is reached, or the error."""
        if self._connecting >= MAX_CONNECTING:
            message = f"{self._name}: {MAX_CONNECTING} connects are under way already"
            send(Failed(errors.Unavailable.code, message), True)
            return
        self._connecting += 1

        def done(result: tuple[str, LinkReport] | errors.PDServeError) -> None:
            self._connecting -= 1
            if isinstance(result, errors.PDServeError):
                send(Failed(result.code, f"{self._name}: {result}"), True)
            else:
                token_bytes = self._model.layout.bytes_per_token
                send(Connected(*result, token_bytes, self._admission.room()), True)

        self._kv_imports.connect(request.endpoint, done)

    def unlink(self, request: Unlink, send: Send) -> None:
        """Close the link to a prefill; ``send`` gets ``Unlinked`` once nothing uses it."""

        def done(error: errors.PDServeError | None) -> None:
            if error is None:
                send(Unlinked(), True)
            else:
                send(Failed(error.code, f"{self._name}: {error}"), True)

        self._kv_imports.unlink(request.prefill, request.epoch, request.number, done)

    def _arrived(self, call: ReservedCall, transfer: TransferReport | Exception) -> None:
        if not isinstance(transfer, Exception):
            call.arrived_at = self._loop.time()
            self._blocks.arrived(call.reserved, call.sequence.prompt)
        call.stuck = isinstance(transfer, Stuck)
        if call.given_up:
            self._end(call, None)
        elif isinstance(transfer, Exception):
            self._end(call, Failed(errors.HandleError.code, f"{self._name}: {transfer}"))
        else:
            call.transfer = transfer
            self._batch.calls[call.request.id] = call
            if call.local:
                self._batch.append(call, transfer.token, self._loop.time(), 0.0)
                self._admission.watches.ended(self._loop.time())  # there is room for another prompt
                return
            if not call.sequence.tokens:
                call.sequence.tokens.append(transfer.token)
            if call.request.min_interval_ms:
                call.sent_at = self._loop.time()
            self._batch.wake()

    def _end(self, call: ReservedCall, reply: Reply | None) -> None:
        """End a request and free everything that it holds."""
        self._batch.calls.pop(call.request.id, None)
        if call.arrived:
            sequence = call.sequence
            # The K and V of the last token are not computed yet.
            known = np.append(sequence.prompt, np.array(sequence.tokens[:-1], np.int32))
            self._blocks.park(call.reserved, known)
        elif not call.stuck:
            self._blocks.free(call.reserved)
        reply = reply or call.given_up or RELEASED
        now = self._loop.time()
        if isinstance(reply, Tokens) and call.arrived_at is not None:
            self._metrics.observe(catalogue.DECODE, now - call.arrived_at, instance=self._name)
        self._admission.end(call, reply, now)

    # ------------------------------------------------------------------ metrics

    def _tick(self) -> bool:
        """Set the metrics; return whether they may change by themselves."""
        used, watches = len(self._admission.open), self._admission.watches
        seconds = self._admission.seconds.drain(self._loop.time())
        show(self._metrics, self._name, used, self._limits.slots, watches, seconds)
        pool = self._blocks.pool
        for state, blocks in (
            ("used", pool.used_blocks),
            ("cached", pool.cached_blocks),
            ("free", pool.free_blocks),
        ):
            self._metrics.set(catalogue.KV_BLOCKS, blocks, instance=self._name, state=state)
        return bool(used or watches)
