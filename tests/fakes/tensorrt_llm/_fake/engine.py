"""An engine: one batch in flight, in a thread with its own loop.

A request waits until there is a place in the batch (``max_batch_size``) and room for its longest
answer. Then its prompt is computed, or its KV cache pulled; and it is decoded with the others. A
context request gives its place away with its answer, and keeps its blocks until they are taken.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tensorrt_llm._fake import models, transceiver
from tensorrt_llm._fake.exchange import Cache, TransferError
from tensorrt_llm._fake.faults import Faults
from tensorrt_llm._fake.reports import Reports
from tensorrt_llm._fake.work import Answer, Work
from tensorrt_llm.version import SINCE_1_3

from pdserve.kvcache.block_pool import BlockPool
from pdserve.transfer.scatter import scatter

if TYPE_CHECKING:
    from tensorrt_llm._fake.models import Model

CLOSE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of an engine."""

    max_batch_size: int
    max_num_tokens: int
    """Prompt tokens in one turn."""
    chunked: bool
    pool_tokens: int
    tokens_per_block: int
    transfers: bool
    """True if it takes part in disaggregated serving."""
    timeout_s: float | None
    """Time limit of a transfer."""


class Engine:
    """An engine; `submit`, `abort` and `close` may be called from any thread."""

    def __init__(self, model: Model, limits: Limits, reports: Reports) -> None:
        self.cache = Cache(model.fingerprint, model.layout, limits.tokens_per_block)
        self.limits = limits
        self.address = ""
        self._reports = reports
        self._faults = Faults()
        blocks = limits.pool_tokens // limits.tokens_per_block
        self._decode = models.engine(model, blocks, limits.tokens_per_block)
        self._blocks = BlockPool(blocks, limits.tokens_per_block)
        reports.created(blocks)
        self._waiting: deque[Work] = deque()
        self._active: dict[int, Work] = {}
        """Requests with a place in the batch."""
        self._computing: list[Work] = []
        self._running: list[Work] = []
        self._pulls: set[asyncio.Task[None]] = set()
        """Kept here, since a loop keeps no tasks alive."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="fake-tensorrt-llm", daemon=True
        )
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    @property
    def held(self) -> int:
        """Return the number of KV caches that wait to be taken."""
        return len(self._sender)

    @property
    def used_blocks(self) -> int:
        return self._blocks.used_blocks

    def submit(self, work: Work) -> None:
        self._loop.call_soon_threadsafe(self._submit, work)

    def abort(self, work: Work) -> None:
        """End a request soon; if its KV cache is being moved, the context's blocks are lost."""
        with suppress(RuntimeError):  # the engine is closed
            self._loop.call_soon_threadsafe(self._abort, work)

    def close(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CLOSE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_S)
            self._loop.close()
            self._decode.close()

    async def _open(self) -> None:
        self._stirred = asyncio.Event()
        self._sender = transceiver.Sender(self.cache, self.limits.timeout_s, self._faults)
        if self.limits.transfers:
            self.address = await self._sender.open()
        self._task = asyncio.create_task(self._run())

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for work in [*self._waiting, *self._active.values()]:
            work.send(Answer(error=RuntimeError("LLM is shutting down")))
        self._sender.close()

    # ---------------------------------------------------------------- requests

    def _submit(self, work: Work) -> None:
        ids = {other.id for other in self._waiting} | self._active.keys()
        if work.kind != "context_and_generation" and not self.limits.transfers:
            reason = "no cache_transceiver_config with a backend: disaggregated requests cannot run"
        elif work.id in ids or (work.kind == "context_only" and work.id in self._sender):
            reason = f"request id {work.id} is in use; a retry needs a new disagg_request_id"
        elif work.room > self._blocks.blocks * self._blocks.block_size:
            reason = f"{work.room} tokens are more than the KV cache's {self.limits.pool_tokens}"
        else:
            if work.kind == "context_only":
                self._sender.sweep()
            self._waiting.append(work)
            self._stirred.set()
            return
        work.send(Answer(error=ValueError(reason)))

    def _abort(self, work: Work) -> None:
        work.aborted = True
        if work.kind == "context_only":
            self._sender.strand(work.id)
        self._stirred.set()

    def _admit(self) -> None:
        for work in [work for work in self._waiting if work.aborted]:
            self._waiting.remove(work)
            work.send(Answer(reason="cancelled"))
        while self._waiting and len(self._active) < self.limits.max_batch_size:
            work = self._waiting[0]
            work.table = self._blocks.allocate(work.room)
            if work.table is None:
                break
            self._waiting.popleft()
            self._active[work.id] = work
            work.sequence.runs = list(work.table.runs)
            if work.kind == "generation_only":
                task = asyncio.create_task(self._pull(work))
                self._pulls.add(task)
                task.add_done_callback(self._pulls.discard)
            else:
                self._computing.append(work)

    def _end(self, work: Work, answer: Answer, *, held: bool = False) -> None:
        """End a request: free its place, and its blocks unless they are held for a generation."""
        del self._active[work.id]
        if not held:
            self._free(work)
        work.send(answer)
        self._stirred.set()

    def _free(self, work: Work) -> None:
        assert work.table is not None
        self._blocks.free(work.table)
        self._reports.removed(work.prompt)
        self._stirred.set()

    # ------------------------------------------------------------------- turns

    async def _run(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            self._admit()
            while self._computing or self._running:
                await self._compute()
                await self._step()
                self._report()
                self._admit()

    async def _compute(self) -> None:
        """Compute as many prompt tokens as one turn has room for."""
        left = self.limits.max_num_tokens
        for work in list(self._computing):
            end = len(work.prompt)
            if self.limits.chunked and not work.sampling.reproducible:
                end = min(end, work.computed + left)
            elif end > left and left < self.limits.max_num_tokens:
                break
            if work.aborted:
                self._computing.remove(work)
                self._end(work, Answer(reason="cancelled"))
                continue
            if end == work.computed:
                break
            await self._part(work, end)
            left = max(left - (end - work.computed), 0)
            work.computed = end

    async def _part(self, work: Work, end: int) -> None:
        try:
            token = await self._decode.prefill(work.sequence, work.computed, end)
            if token is None:
                return
            if work.kind == "context_only":
                await self._faults.meet("context")
        except Exception as error:  # one bad request must not end the engine
            self._computing.remove(work)
            self._end(work, Answer(error=error))
            return
        self._computing.remove(work)
        self._reports.stored(work.prompt)
        work.sequence.tokens.append(token)
        if work.kind == "context_only":
            self._hand_over(work)
        else:
            self._running.append(work)
            self._answer(work)

    def _hand_over(self, work: Work) -> None:
        """Hold the KV cache; nothing moves before a generation engine asks for it."""
        reason = work.reason or "length"
        held = reason == "length" or SINCE_1_3
        if held:
            self._sender.hold(work.id, partial(self._read, work), partial(self._free, work))
        self._end(work, Answer(work.unsent(), reason), held=held)

    async def _step(self) -> None:
        for work in [work for work in self._running if work.aborted]:
            self._running.remove(work)
            self._end(work, Answer(work.unsent(), "cancelled"))
        batch = list(self._running)
        if not batch:
            return
        try:
            await self._faults.meet("step")
            tokens = await self._decode.step([work.sequence for work in batch])
        except Exception as error:  # one bad request must not end the engine
            for work in batch:
                self._running.remove(work)
                self._end(work, Answer(error=error))
            return
        for work, token in zip(batch, tokens, strict=True):
            work.sequence.tokens.append(token)
            self._answer(work)

    def _answer(self, work: Work) -> None:
        reason = work.reason
        if reason is not None:
            self._running.remove(work)
            self._end(work, Answer(work.unsent(), reason))
        elif work.interval and len(work.sequence.tokens) - work.sent >= work.interval:
            work.send(Answer(work.unsent()))

    # ---------------------------------------------------------------- transfer

    def _read(self, work: Work) -> NDArray[np.uint8]:
        pool = np.asarray(self._decode.pool)
        rows = work.sequence.rows(len(work.prompt))
        return np.concatenate([pool[:, first : first + count] for first, count in rows], axis=1)

    def _write(self, work: Work, kv: NDArray[np.uint8]) -> None:
        pool = np.asarray(self._decode.pool)
        scatter(kv, pool, work.sequence.rows(len(work.prompt)))
        self._decode.joined(work.sequence)

    async def _pull(self, work: Work) -> None:
        try:
            await self._faults.meet("transfer")
            if work.link is None or work.first is None:
                raise TransferError("the request has no link to a context engine")
            moved = transceiver.pull(work.link, self.cache, len(work.prompt), lambda: work.aborted)
            kv = await asyncio.wait_for(moved, self.limits.timeout_s)
            await asyncio.to_thread(self._write, work, kv)
        except Exception as error:  # one bad request must not end the engine
            late = isinstance(error, asyncio.TimeoutError)
            reason = f"nothing came within {self.limits.timeout_s} s" if late else error
            failed = TransferError(f"KV cache of request {work.id}: {reason}")
            self._end(work, Answer(reason="cancelled") if work.aborted else Answer(error=failed))
            return
        work.sequence.tokens.append(work.first)
        self._running.append(work)
        if work.reason is not None:
            self._answer(work)
        self._stirred.set()

    def _report(self) -> None:
        self._reports.iteration(
            waiting=len(self._waiting),
            active=len(self._active),
            prompts=len(self._computing),
            running=len(self._running),
            blocks=self._blocks,
        )
