"""The prompts of a prefill on their way through its engine, batch by batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from pdserve import errors
from pdserve.engines.protocol import PrefillEngine
from pdserve.instances.acceptance import Trials
from pdserve.instances.forwards import Forwards
from pdserve.instances.held_prompt import HeldPrompt
from pdserve.instances.kv_exports import KVExports
from pdserve.instances.prefill_batch import next_batch
from pdserve.kvcache.arena import Range
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Failed, Reply

_LATE = Failed(errors.Unavailable.code, "too late to begin with it")


class PromptComputation:
    """Computes the prompts of one prefill instance; used in its event loop.

    Args:
        batch_tokens: maximum uncached tokens of a forward of more than one prompt.
        done: called with each computed prompt, its first token, and the milliseconds of its
            forward.
        end: called with each prompt that is given up or has failed, and the reply to it.
        nearly_over: called when a running forward leaves room for the next batch.
    """

    def __init__(
        self,
        name: str,
        engine: PrefillEngine,
        batch_tokens: int,
        exports: KVExports,
        metrics: Registry,
        trials: Trials,
        done: Callable[[HeldPrompt, int, float], None],
        end: Callable[[HeldPrompt, Reply], None],
        nearly_over: Callable[[], None],
    ) -> None:
        self._name = name
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._exports = exports
        self._metrics = metrics
        self._trials = trials
        self._done = done
        self._end = end
        self._forwards = Forwards(nearly_over)
        self.pending: list[HeldPrompt] = []
        """The prompts of the next forwards, in order of arrival."""
        self._on_trial: HeldPrompt | None = None
        """A suspect that has been accepted and is not pending yet."""
        self._work = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of prompts that leave no room for others in the next forward."""
        return len(self.pending) + self._forwards.prompts + (self._on_trial is not None)

    def add(self, held: HeldPrompt) -> None:
        """Compute a prompt: a suspect after its trial has begun."""
        if held.request.suspect:
            self._on_trial = held
            self._trials.begin(partial(self._try, held))
        else:
            self._add(held)

    def _try(self, held: HeldPrompt) -> None:
        self._on_trial = None
        if held.given_up:
            self._end(held, held.given_up)
        else:
            self._add(held)

    def _add(self, held: HeldPrompt) -> None:
        self.pending.append(held)
        self._work.set()

    def give_up(self, held: HeldPrompt, reply: Reply) -> None:
        """Give up a prompt: now if it is pending, and otherwise after its trial or forward."""
        held.given_up = reply
        if held in self.pending:
            self.pending.remove(held)
            self._end(held, reply)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self.pending:
                self._give_up_late()
                if self.pending:
                    await self._forward(*self._next_batch())

    async def _forward(self, batch: list[HeldPrompt], sources: list[Range]) -> None:
        """Compute prompts together."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        uncached = sum(len(held.job.tokens) - held.job.cached for held in batch)
        try:
            with self._forwards.running(len(batch), uncached):
                tokens = await self._engine.prefill([held.job for held in batch])
        except Exception as error:  # one failed forward may not end the instance
            failed = Failed(errors.InstanceError.code, f"{self._name}: {error!r}")
            for held in batch:
                self._end(held, failed)
            return
        finally:
            self._exports.unpin(sources)
            seconds = loop.time() - began
            self._metrics.add(catalogue.BUSY_SECONDS, seconds, instance=self._name)
        self._metrics.add(catalogue.STEPS, 1, instance=self._name)
        ms = seconds * 1e3
        for held, token in zip(batch, tokens, strict=True):
            self._metrics.observe(catalogue.PREFILL, seconds, instance=self._name)
            if held.given_up:
                self._end(held, held.given_up)
            else:
                self._done(held, token, ms)

    def _give_up_late(self) -> None:
        """Give up the prompts whose limit has passed."""
        now = asyncio.get_running_loop().time()
        for held in [held for held in self.pending if now >= held.deadline]:
            self.pending.remove(held)
            self._end(held, _LATE)

    def _next_batch(self) -> tuple[list[HeldPrompt], list[Range]]:
        """Take the prompts of the next forward, and pin the ranges of their prefixes."""
        batch = next_batch(self.pending, self._exports.prefixes, self._batch_tokens)
        sources = self._exports.pin(batch)
        chosen = [held for held, _ in batch]
        taken = set(map(id, chosen))
        self.pending = [held for held in self.pending if id(held) not in taken]
        return chosen, sources
