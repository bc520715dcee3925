"""The running batch of a decode: its steps, and the tokens that they add to answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve import config, errors
from pdserve.engines.protocol import DecodeEngine, EngineModel
from pdserve.instances.acceptance import interval_s
from pdserve.instances.accepted_call import ReservedCall
from pdserve.instances.local_prefill import LocalPrefill
from pdserve.instances.room_admission import RoomAdmission
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Failed, Reply


class RunningBatch:
    """Decodes requests that have joined, all of them in each step; used in its event loop.

    Requests join and leave between two steps, and local prompts are computed there.

    Args:
        admission: of the instance, by which replies with tokens are made and sent.
        end: called with each request that has ended, and its last reply; None: it was given up.
    """

    def __init__(
        self,
        name: str,
        model: EngineModel,
        engine: DecodeEngine,
        limits: config.Decode,
        admission: RoomAdmission[ReservedCall],
        local_prefill: LocalPrefill,
        metrics: Registry,
        end: Callable[[ReservedCall, Reply | None], None],
    ) -> None:
        self._name = name
        self._model = model
        self._engine = engine
        self._limits = limits
        self._admission = admission
        self._local_prefill = local_prefill
        self._metrics = metrics
        self._end = end
        self.calls: dict[str, ReservedCall] = {}
        """The requests in the batch, by their ids."""
        self._work = asyncio.Event()

    def wake(self) -> None:
        """Look for work: a request has joined, has been released, or has a local prompt."""
        self._work.set()

    async def run(self) -> None:
        """Run until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            self._work.clear()
            while self.calls or self._local_prefill:
                began = loop.time()
                await self._local_prefill.turn()
                if batch := self._batch():
                    stepped = loop.time()
                    await self._step(batch)
                    self._count(len(batch), loop.time() - stepped)
                seconds = loop.time() - began
                self._metrics.add(catalogue.BUSY_SECONDS, seconds, instance=self._name)

    def _count(self, batch: int, seconds: float) -> None:
        """Count a step, with what a line through times of steps over sizes of batches needs."""
        name = self._name
        self._metrics.add(catalogue.STEPS, 1, instance=name)
        self._metrics.add(catalogue.STEP_SEQUENCES, batch, instance=name)
        self._metrics.add(catalogue.STEP_SEQUENCES_SQUARED, batch * batch, instance=name)
        self._metrics.add(catalogue.STEP_SEQUENCE_SECONDS, batch * seconds, instance=name)

    def _batch(self) -> list[ReservedCall]:
        for call in [call for call in self.calls.values() if call.given_up]:
            self._end(call, None)
        return list(self.calls.values())

    async def _step(self, batch: list[ReservedCall]) -> None:
        try:
            tokens = await self._engine.step([call.sequence for call in batch])
        except Exception as error:  # one failed step may not end the instance
            failed = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
            for call in batch:
                self._end(call, failed)
            return
        now = asyncio.get_running_loop().time()
        for call, token in zip(batch, tokens, strict=True):
            interval = interval_s(self._limits, len(self._admission.open), call.request)
            self.append(call, token, now, interval)

    def append(self, call: ReservedCall, token: int, now: float, interval: float) -> None:
        """Add a token to an answer; send all new ones if ``interval`` seconds have passed."""
        if call.given_up:
            return
        request, sequence = call.request, call.sequence
        sequence.tokens.append(token)
        call.unsent.append(token)
        reason = ""
        if token in self._model.eos_ids and not request.ignore_eos:
            reason = "stop"
        elif len(sequence.tokens) >= request.max_tokens:
            reason = "length"
        elif now - call.sent_at < interval:
            return
        reply = self._admission.tokens(call, len(sequence.tokens) - len(call.unsent), reason)
        if reason:
            self._end(call, reply)
        else:
            self._admission.tell(call, reply, now)
