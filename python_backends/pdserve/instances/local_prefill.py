"""Prompts that a decode computes itself, in turns with the steps of its running batch.

A turn is bounded, and a longer prompt takes several: the running streams wait for one turn at a
time. Their waits, on two cores for SmolLM2-135M in float32: 8 streams with a token every 105 ms
have one after 310 ms beside a prompt of 64 tokens, after 630 ms beside one of 256, and after 1.2 s
at each turn of 512.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pdserve import errors
from pdserve.engines.protocol import DecodeEngine
from pdserve.instances.acceptance import AGAIN_S
from pdserve.instances.accepted_call import ReservedCall
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Accepted
from pdserve.transfer import arrays
from pdserve.transfer.reports import TransferReport

# Below this many bytes a copy costs less than handing it to another thread.
INLINE_COPY = 256 << 10


@dataclass(slots=True, eq=False)
class _Prompt:
    call: ReservedCall
    computed: int
    """Number of tokens whose K and V are in its blocks, or will be once the cached ones are
    copied."""
    seconds: float = 0.0
    """Seconds spent on computing it."""


class LocalPrefill:
    """Computes prompts in one decode instance, in order of arrival; used in its event loop.

    Args:
        turn_tokens: maximum tokens that are computed in one turn.
        done: called once for each prompt, in a turn.
    """

    def __init__(
        self,
        name: str,
        engine: DecodeEngine,
        turn_tokens: int,
        metrics: Registry,
        done: Callable[[ReservedCall, TransferReport | Exception], None],
    ) -> None:
        self._name = name
        self._engine = engine
        self._turn_tokens = turn_tokens
        self._metrics = metrics
        self._done = done
        self._waiting: list[_Prompt] = []

    def __len__(self) -> int:
        """Return the number of prompts that are not computed yet."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Tell whether the waiting prompts take a turn or more, so that new ones are refused."""
        return sum(map(self._left, self._waiting)) >= self._turn_tokens

    def add(self, call: ReservedCall) -> None:
        """Compute a prompt, except for the prefix that the pool has."""
        self._waiting.append(_Prompt(call, call.reserved.held))

    async def turn(self) -> None:
        """Compute a part of the first prompt; if that ends it, also the next prompts that fit.

        No step of the engine may run meanwhile.
        """
        for prompt in [each for each in self._waiting if each.call.given_up]:
            self._end(prompt, errors.Cancelled("released"))
        room = self._turn_tokens
        while self._waiting and (room == self._turn_tokens or self._left(self._waiting[0]) <= room):
            prompt = self._waiting[0]
            tokens = self._left(prompt)
            if not prompt.call.request.sampling.reproducible:
                tokens = min(tokens, room)
            room -= tokens
            await self._compute(prompt, tokens)

    async def _compute(self, prompt: _Prompt, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        call, began = prompt.call, loop.time()
        try:
            if prompt.computed == call.reserved.held:
                await self._copy(call)
            begin = prompt.computed
            prompt.computed += tokens
            token = await self._engine.prefill(call.sequence, begin, prompt.computed)
        except Exception as error:  # it fails this request only; the others go on
            self._end(prompt, error)
            return
        now = loop.time()
        prompt.seconds += now - began
        if token is not None:
            self._metrics.observe(catalogue.LOCAL_PREFILL, prompt.seconds, instance=self._name)
            ms, cached = prompt.seconds * 1e3, call.reserved.held
            self._end(prompt, TransferReport(0, "local", "", ms, 0.0, 0.0, token, cached))
        elif now - call.sent_at >= AGAIN_S:
            call.sent_at = now
            call.send(Accepted(), False)

    async def _copy(self, call: ReservedCall) -> None:
        """Copy the prefix that the pool has into a prompt's blocks."""
        pool, reserved = self._engine.pool, call.reserved

        def copy() -> None:
            for source, target, rows in reserved.copies():
                arrays.copy_rows(pool, source, target, rows)

        if reserved.held * pool[:, 0].nbytes <= INLINE_COPY:
            copy()
        else:
            await asyncio.to_thread(copy)

    def _end(self, prompt: _Prompt, computed: TransferReport | Exception) -> None:
        self._waiting.remove(prompt)
        self._done(prompt.call, computed)

    @staticmethod
    def _left(prompt: _Prompt) -> int:
        return len(prompt.call.sequence.prompt) - prompt.computed
