"""A decode instance: reserves at once, pulls the KV cache, and decodes in one running batch.

Blocks for the prompt and the longest answer are reserved on acceptance, so that
an accepted request never waits for memory again. Requests join and leave the
batch between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pdserve import config, errors
from pdserve.engines.protocol import DecodeEngine, DecodeSequence, EngineModel
from pdserve.kvcache.paged import BlockPool, BlockTable
from pdserve.messages import Accepted, Busy, DecodeRequest, Failed, Released, Reply, Tokens
from pdserve.metrics import Registry
from pdserve.transfer.shm import ShmReceiver

Send = Callable[[Reply, bool], None]
"""Sends a reply; True with the last one."""

TICK_S = 0.1
# Tokens that come sooner than this speak for themselves; else the acceptance is told first.
ACCEPTED_AFTER_S = 0.005
# Below this many bytes a copy costs less than handing it to another thread.
INLINE_PULL = 256 << 10


@dataclass(slots=True, eq=False)
class _Open:
    """An accepted request."""

    request: DecodeRequest
    send: Send
    table: BlockTable
    sequence: DecodeSequence
    unsent: list[int] = field(default_factory=list)
    sent_at: float = 0.0
    transfer_ms: float | None = None
    """Until it has been told."""
    released: bool = False
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Tells the acceptance, unless something else is told before."""

    def tell(self, reply: Reply, last: bool) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.send(reply, last)


class DecodeInstance:
    """One engine in the decode role. Only larger pulls run outside the event loop.

    Args:
        peers: decodes that a gateway spreads its streams over; see ``_interval``.
    """

    def __init__(
        self,
        name: str,
        model: EngineModel,
        engine: DecodeEngine,
        limits: config.Decode,
        peers: int,
        metrics: Registry,
    ) -> None:
        self._name = name
        self._model = model
        self._engine = engine
        self._limits = limits
        self._peers = peers
        self._metrics = metrics
        self._pool = BlockPool(limits.blocks, limits.block_size)
        self._capacity = limits.blocks * limits.block_size
        self._receiver = ShmReceiver(model.fingerprint, model.layout)
        self._open: dict[str, _Open] = {}
        self._running: dict[str, _Open] = {}
        self._work = asyncio.Event()
        self._puller = ThreadPoolExecutor(1, thread_name_prefix="pull")
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to decode and to keep time; called once in the running loop."""
        # An event loop's clock is CLOCK_MONOTONIC, which leases and handles count by.
        self._loop = asyncio.get_running_loop()
        for work in (self._decode(), self._keep_time()):
            self._tasks.add(asyncio.create_task(work))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._puller.shutdown(wait=True, cancel_futures=True)
        self._engine.close()
        for opened in list(self._open.values()):
            failed = Failed(errors.InstanceError.code, f"{self._name} is shutting down")
            self._end(opened, failed)
        self._receiver.close()

    # ---------------------------------------------------------------- admission

    def submit(self, request: DecodeRequest, send: Send) -> None:
        """Accept or reject, at once; ``send`` gets the rejection or, later, the tokens."""
        prompt = np.frombuffer(request.prompt, "<i4")
        length = len(prompt) + request.max_tokens
        if length > self._capacity:
            message = (
                f"{len(prompt)} prompt tokens and max_tokens {request.max_tokens} need more than "
                f"the {self._capacity} tokens that {self._name}'s blocks hold"
            )
            send(Failed(errors.InvalidRequest.code, message), True)
            return
        if request.id in self._open:
            send(Failed(errors.InvalidRequest.code, f"request id {request.id} is in use"), True)
            return
        if len(self._open) >= self._limits.slots:
            send(Busy("slots"), True)
            return
        table = self._pool.allocate(length)
        if table is None:
            send(Busy("blocks"), True)
            return
        sequence = DecodeSequence(
            prompt=prompt,
            tokens=[request.first_token],
            runs=list(table.runs),
            sampling=request.sampling,
        )
        opened = self._open[request.id] = _Open(request, send, table, sequence)
        opened.timer = self._loop.call_later(ACCEPTED_AFTER_S, send, Accepted(), False)
        if request.handle.nbytes <= INLINE_PULL:
            self._join(opened, self._pull(opened))
        else:
            task = asyncio.create_task(self._pull_aside(opened))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def release(self, request_id: str, send: Send) -> None:
        """Nobody wants the tokens any more; what a step or a pull still uses is freed after it."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.released = True
            self._work.set()
        send(Released(), True)

    # ----------------------------------------------------------------- transfer

    def _pull(self, opened: _Open) -> Exception | None:
        began = self._loop.time()
        try:
            with self._receiver.pull(opened.request.handle, began) as source:
                self._engine.join(opened.sequence, source)
        except Exception as error:  # becomes this request's one error; the others go on
            return error
        opened.transfer_ms = (self._loop.time() - began) * 1e3
        return None

    async def _pull_aside(self, opened: _Open) -> None:
        error = await self._loop.run_in_executor(self._puller, self._pull, opened)
        self._join(opened, error)

    def _join(self, opened: _Open, error: Exception | None) -> None:
        if opened.released:
            self._end(opened, None)
        elif error is not None:
            self._end(opened, Failed(errors.HandleError.code, f"{self._name}: {error}"))
        else:
            assert opened.transfer_ms is not None
            self._metrics.observe("pdserve_kv_transfer_seconds", opened.transfer_ms / 1e3)
            self._metrics.add(
                "pdserve_kv_transfer_bytes_total", opened.request.handle.nbytes, transport="shm"
            )
            if opened.request.min_interval_ms:
                opened.sent_at = self._loop.time()
            self._running[opened.request.id] = opened
            self._work.set()

    # ------------------------------------------------------------------- decode

    async def _decode(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while batch := self._batch():
                sequences = [opened.sequence for opened in batch]
                try:
                    tokens = await self._engine.step(sequences)
                except Exception as error:  # one bad step may not end the instance
                    failed = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
                    for opened in batch:
                        self._end(opened, failed)
                    continue
                now = self._loop.time()
                interval = self._interval()
                for opened, token in zip(batch, tokens, strict=True):
                    self._append(opened, token, now, interval)

    def _batch(self) -> list[_Open]:
        for opened in [opened for opened in self._running.values() if opened.released]:
            self._end(opened, None)
        return list(self._running.values())

    def _interval(self) -> float:
        """Seconds between two responses of a stream: what all of them together cost, bounded.

        Its own open streams times ``peers`` stand for what the gateway has open, since
        the gateway spreads them evenly.
        """
        cost = self._limits.response_cost_ms * len(self._open) * self._peers
        return min(cost, self._limits.max_interval_ms) / 1e3

    def _append(self, opened: _Open, token: int, now: float, interval: float) -> None:
        if opened.released:
            return
        request, sequence = opened.request, opened.sequence
        sequence.tokens.append(token)
        opened.unsent.append(token)
        reason = ""
        if token in self._model.eos_ids and not request.ignore_eos:
            reason = "stop"
        elif len(sequence.tokens) >= request.max_tokens:
            reason = "length"
        elif now - opened.sent_at < max(interval, request.min_interval_ms / 1e3):
            return
        ids = np.array(opened.unsent, "<i4").tobytes()
        start = len(sequence.tokens) - len(opened.unsent)
        reply = Tokens(start, ids, reason, opened.transfer_ms)
        if reason:
            self._end(opened, reply)
        else:
            opened.tell(reply, False)
            opened.unsent.clear()
            opened.transfer_ms = None
            opened.sent_at = now

    def _end(self, opened: _Open, reply: Reply | None) -> None:
        """The request is over; nothing is held for it from here on."""
        self._running.pop(opened.request.id, None)
        del self._open[opened.request.id]
        self._pool.free(opened.table)
        opened.tell(reply or Failed(errors.Cancelled.code, "released"), True)

    # ------------------------------------------------------------------ metrics

    async def _keep_time(self) -> None:
        gauge = self._metrics.set
        while True:
            used = len(self._open)
            gauge("pdserve_slots", used, instance=self._name, state="used")
            gauge("pdserve_slots", self._limits.slots - used, instance=self._name, state="free")
            gauge("pdserve_kv_blocks", self._pool.used_blocks, instance=self._name, state="used")
            gauge("pdserve_kv_blocks", self._pool.free_blocks, instance=self._name, state="free")
            await asyncio.sleep(TICK_S)
