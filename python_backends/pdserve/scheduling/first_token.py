"""The token that a prefill has computed, from its arrival at the gateway to its client."""

from __future__ import annotations

import asyncio
import math

from pdserve import errors
from pdserve.scheduling.decode_stage import DecodeStage
from pdserve.scheduling.offering import Offered
from pdserve.scheduling.prefill_stage import Computed, late
from pdserve.scheduling.request import Chunk, FinishReason, Request
from pdserve.scheduling.rooms import HELD_S


class FirstTokens:
    """Sends first tokens at once, or holds them back until a decode has been reserved.

    A first token is held back where decodes are short of room, since a client that has it counts
    on the others.
    """

    def __init__(self, decode_stage: DecodeStage) -> None:
        self._decode_stage = decode_stage

    def take(self, request: Request, computed: Computed) -> Chunk:
        """Add the token that the prefill has computed to the request's answer.

        Raises:
            Late: it came after the request's limit.
        """
        result = computed.result
        now = asyncio.get_running_loop().time()
        if now > request.deadline:
            raise late("no first token", request)
        if not request.first_token:
            request.first_token = now
            request.cached_tokens = result.cached_tokens
            request.prefill_ms = result.compute_ms
        ids = request.add(result.token.to_bytes(4, "little"))
        reason: FinishReason = ""
        if result.eos and not request.ignore_eos:
            reason = "stop"
        elif request.output_tokens == request.max_tokens:
            reason = "length"
        return Chunk(ids, reason)

    async def reserve(self, request: Request, computed: Computed) -> Offered:
        """Reserve a decode for the other tokens; see ``DecodeStage.reserve``."""
        return await self._decode_stage.reserve(
            request, computed.prefill, computed.result.token, computed.handle, request.ends_by
        )

    async def hold_back(self, request: Request, computed: Computed) -> asyncio.Task[Offered]:
        """Begin to reserve a decode before the first token is sent; return the task that does.

        On return the task has reserved one, or the token need not wait for it any longer.

        Raises:
            Late: no decode was idle within the request's limit.
            NoRoom: no decode was idle for as long as the prefill keeps the KV cache.
            InstanceError, InvalidRequest, Unavailable: as if the token had been sent.
        """
        loop = asyncio.get_running_loop()
        whole_answer, told_at = request.output_tokens == 1, 0.0
        request.held_back = True
        reserving = loop.create_task(self.reserve(request, computed))
        try:
            left = request.deadline - loop.time()
            await asyncio.wait({reserving}, timeout=min(left, HELD_S))
            if not reserving.done() and not self._decode_stage.plenty(math.inf):
                await asyncio.wait({reserving}, timeout=request.deadline - loop.time())
                if not reserving.done():
                    raise errors.Late("the limit of the first token has passed")
            if reserving.done():
                reserving.result()
            told_at = loop.time()
        except errors.Late as error:
            why = self._decode_stage.decodes.why_not()
            raise errors.Late(f"{why} within the request's limit") from error
        finally:
            request.held_back = False
            if not told_at:
                request.take_back(1)
                self.give_up(reserving)
            if whole_answer:
                request.first_token = told_at
        return reserving

    def give_up(self, reserving: asyncio.Task[Offered]) -> None:
        """Cancel the reservation of a decode; one that it has reserved is released."""

        def ended(task: asyncio.Task[Offered]) -> None:
            if not task.cancelled() and task.exception() is None:
                self._decode_stage.let_go(task.result())

        reserving.cancel()
        reserving.add_done_callback(ended)
