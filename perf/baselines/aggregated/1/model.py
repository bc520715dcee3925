"""Baseline: one instance computes prompts and decodes; everything else is pdserve's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pdserve import config
from pdserve.engines import build
from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.kvcache.block_pool import BlockPool, BlockTable
from pdserve.scheduling.request import Chunk, Request, State
from pdserve.text.vocabulary import Vocabulary
from pdserve.transfer import arrays
from pdserve.triton import pdserve


class TritonPythonModel(pdserve.TritonPythonModel):
    """The pdserve model, with one engine in place of the scheduler."""

    def read(self, model: Path) -> Vocabulary:
        # The engine is loaded here, since the time in which the loop has to begin is bounded.
        self._aggregated = Aggregated(self.deployment)
        return super().read(model)

    async def _start(self) -> None:
        await super()._start()
        aggregated = self._aggregated
        self._service._router.default.next_group = lambda: aggregated  # type: ignore[assignment]
        self._always.start(aggregated.compute())


@dataclass(slots=True, eq=False)
class _Open:
    request: Request
    sequence: DecodeSequence
    chunks: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    table: BlockTable | None = None
    unsent: list[int] = field(default_factory=list)
    sent_at: float = 0.0
    gone: bool = False


class Aggregated:
    """Computes as many prompts as there is room for, then one decode step, and so on."""

    name = "aggregated"

    def __init__(self, deployment: config.Deployment) -> None:
        self._model = build.model(deployment)
        self._prefill = build.prefill(self._model)
        self._limits = deployment.decode
        self._decode = build.decode(self._model, self._limits)
        self._pool = BlockPool(self._limits.blocks, self._limits.block_size)
        self._batch_tokens = deployment.prefill.batch_tokens
        self._waiting: list[_Open] = []
        self._running: list[_Open] = []
        self._work = asyncio.Event()

    @contextmanager
    def serving(self, request: Request) -> Iterator[Aggregated]:
        """Return the scheduler of a request, as a group does."""
        yield self

    async def run(self, request: Request) -> AsyncIterator[Chunk]:
        """Yield the answer as it comes."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        request.arrived = request.forwarded = now
        request.to(State.PREFILLING, now)
        prompt = np.frombuffer(request.prompt, "<i4")
        opened = _Open(request, DecodeSequence(prompt, [], [], request.sampling))
        self._waiting.append(opened)
        self._work.set()
        try:
            while True:
                chunk = await opened.chunks.get()
                if not request.first_token:
                    request.first_token = loop.time()
                    request.to(State.PREFILLED, request.first_token)
                request.output_tokens += len(chunk.ids)
                yield chunk
                if chunk.finish_reason or request.answer_ended:
                    request.finish(chunk.finish_reason, loop.time())
                    return
        finally:
            request.ended = loop.time()
            opened.gone = True

    async def compute(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting or self._running:
                await self._compute_prompts()
                await self._step()

    async def _compute_prompts(self) -> None:
        batch: list[_Open] = []
        tokens = 0
        while self._waiting and len(self._running) + len(batch) < self._limits.slots:
            opened = self._waiting[0]
            prompt = opened.sequence.prompt
            if batch and tokens + len(prompt) > self._batch_tokens:
                break
            opened.table = self._pool.allocate(len(prompt) + opened.request.max_tokens)
            if opened.table is None:
                break
            opened.sequence.runs = list(opened.table.runs)
            batch.append(self._waiting.pop(0))
            tokens += len(prompt)
        if not batch:
            return
        layout = self._model.layout
        jobs = [
            PrefillJob(
                tokens=one.sequence.prompt,
                kv=arrays.like(self._decode.pool, layout.shape(len(one.sequence.prompt))),
                sampling=one.request.sampling,
            )
            for one in batch
        ]
        firsts = await self._prefill.prefill(jobs)
        for opened, job, first in zip(batch, jobs, firsts, strict=True):
            arrays.scatter(job.kv, self._decode.pool, opened.sequence.rows(len(job.tokens)))
            self._decode.joined(opened.sequence)
            self._running.append(opened)
            self._append(opened, first, 0.0)

    async def _step(self) -> None:
        for opened in [opened for opened in self._running if opened.gone]:
            self._end(opened)
        if not self._running:
            return
        batch = list(self._running)
        tokens = await self._decode.step([opened.sequence for opened in batch])
        interval = min(self._limits.response_cost_ms * len(batch), self._limits.max_interval_ms)
        for opened, token in zip(batch, tokens, strict=True):
            self._append(opened, token, interval / 1e3)

    def _append(self, opened: _Open, token: int, interval: float) -> None:
        """Append a token.

        It is sent at once if it is the first or the last, else after the interval.
        """
        request, sequence = opened.request, opened.sequence
        sequence.tokens.append(token)
        opened.unsent.append(token)
        now = asyncio.get_running_loop().time()
        if token in self._model.eos_ids and not request.ignore_eos:
            opened.chunks.put_nowait(Chunk(opened.unsent, "stop"))
            self._end(opened)
        elif len(sequence.tokens) >= request.max_tokens:
            opened.chunks.put_nowait(Chunk(opened.unsent, "length"))
            self._end(opened)
        elif len(sequence.tokens) == 1 or (request.stream and now - opened.sent_at >= interval):
            opened.chunks.put_nowait(Chunk(opened.unsent, ""))
            opened.unsent, opened.sent_at = [], now

    def _end(self, opened: _Open) -> None:
        self._running.remove(opened)
        assert opened.table is not None
        self._pool.free(opened.table)
