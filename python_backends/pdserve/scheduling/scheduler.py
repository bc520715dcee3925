"""The life of a request: an idle prefill, its first token, an idle decode, the rest."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

import numpy as np

from pdserve import errors, messages
from pdserve.messages import Accepted, Busy, Failed, Prefilled, Stranger, Tokens
from pdserve.metrics import Registry
from pdserve.scheduling.instance import Call, Instance
from pdserve.scheduling.meetings import Meetings
from pdserve.scheduling.request import FINAL, Chunk, FinishReason, Request, State
from pdserve.scheduling.waiting import WaitingLine

# An instance accepts or rejects at once: one that does neither for so long has failed.
ANSWER_S = 2.0
# Replies of an answer that nobody reads as it comes; often enough to show life.
UNREAD_INTERVAL_MS = 1000.0
MAX_WAITING = 4096
PREFILL_ATTEMPTS = 2


class _Late(errors.Unavailable):
    """The request's TTFT limit has passed."""

    def __init__(self, what: str, request: Request, now: float) -> None:
        super().__init__(
            f"{what} within the TTFT limit of {request.ttft_limit_s * 1e3:g} ms "
            f"({(now - request.arrived) * 1e3:.0f} ms waited)"
        )


class _Offered(NamedTuple):
    """An instance has taken a request."""

    instance: Instance
    call: Call
    reply: messages.Reply
    """Its first."""


class _Computed(NamedTuple):
    """A prompt's KV cache lies in a prefill."""

    prefill: Instance
    call: Call
    result: Prefilled
    handle: bytes
    decode: _Offered | None
    """That has followed the computation already."""


class Scheduler:
    """Serves any number of requests at once over one set of prefills and decodes.

    Args:
        meetings: of the same instances.
        stall_s: an instance silent for so long has failed.
        lease_s: how long a prefill keeps a KV cache that no decode has taken.
        rng: source of jitter.
    """

    def __init__(
        self,
        prefills: Sequence[Instance],
        decodes: Sequence[Instance],
        meetings: Meetings,
        metrics: Registry,
        *,
        stall_s: float,
        lease_s: float,
        rng: random.Random,
    ) -> None:
        self._prefills = prefills
        self._decodes = decodes
        self._meetings = meetings
        self._metrics = metrics
        self._stall_s = stall_s
        self._lease_s = lease_s
        self._for_prefill = WaitingLine(rng)
        self._for_decode = WaitingLine(rng)
        self._unique = uuid.UUID(int=rng.getrandbits(128)).hex
        self._calls = 0

    async def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes; closing the iterator early cancels the request.

        Raises:
            InvalidRequest: no instance can ever hold it.
            Unavailable: no prefill or no decode within the limit.
            InstanceError: an instance failed and no other could go on.
        """
        loop = asyncio.get_running_loop()
        request.arrived = loop.time()
        try:
            async with aclosing(self._run(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseException as error:
            if request.state not in FINAL:
                request.to(_end(request.state, error))
            raise
        finally:
            request.ended = loop.time()
            self._account(request)

    async def _run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        loop = asyncio.get_running_loop()
        computed = await self._prefill(request)
        result = computed.result
        try:
            request.to(State.PREFILLED)
            now = loop.time()
            if now > request.deadline:
                raise _Late("no first token", request, now)
            request.first_token = now
            request.cached_tokens = result.cached_tokens
            request.prefill_ms = result.compute_ms
            request.output_tokens = 1
            reason: FinishReason = ""
            if result.eos and not request.ignore_eos:
                reason = "stop"
            elif request.max_tokens == 1:
                reason = "length"
            yield Chunk([result.token], reason)
            if reason or request.answer_ended:
                request.finish(reason, loop.time())
                return
            async with aclosing(self._decode(request, computed)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if computed.decode is not None:
                computed.decode.call.close()
            computed.call.close()
            self._for_prefill.wake()

    # ------------------------------------------------------------------ prefill

    async def _prefill(self, request: Request) -> _Computed:
        """Offer the request to idle prefills until one takes it, and wait for its result."""
        for attempt in range(1, PREFILL_ATTEMPTS + 1):
            taken = await self._forward(request)
            request.attempts = attempt
            try:
                return await self._result(request, taken)
            except errors.InstanceError:
                if attempt == PREFILL_ATTEMPTS:
                    raise
            self._metrics.add("pdserve_retries_total", phase="prefill", reason="error")
            request.to(State.WAITING)
        raise AssertionError("unreachable")

    async def _result(self, request: Request, taken: _Offered) -> _Computed:
        """What the prefill that has taken it makes of it.

        Raises:
            InstanceError: it failed; another may be asked.
        """
        prefill, call, reply = taken
        handle, decode = b"", None
        try:
            while isinstance(reply, Accepted):
                if reply.handle is not None:
                    handle = reply.handle
                    decode = await self._offer_decodes(request, prefill, None, handle)
                reply = await call.reply(self._stall_s)
            if isinstance(reply, Prefilled):
                return _Computed(prefill, call, reply, handle or reply.handle, decode)
            error = _error(reply)
            if isinstance(error, errors.InstanceError):
                call.suspect()
            elif isinstance(error, errors.Unavailable):
                error = _Late("no first token", request, asyncio.get_running_loop().time())
            raise error
        except BaseException:
            if decode is not None:
                decode.call.close()
            call.close()
            raise

    async def _forward(self, request: Request) -> _Offered:
        loop = asyncio.get_running_loop()
        if not len(self._for_prefill) and loop.time() < request.deadline:
            # Nobody waits, so this request may try without standing in line.
            taken = await self._offer_prefills(request)
            if taken:
                return taken
        if len(self._for_prefill) >= MAX_WAITING:
            raise errors.Unavailable(f"{MAX_WAITING} requests wait for a prefill already")
        place = self._for_prefill.join(request.priority, request.arrived)
        try:
            while await place.turn(request.deadline):
                taken = await self._offer_prefills(request)
                if taken:
                    return taken
        finally:
            place.leave()
        raise _Late("no idle prefill", request, loop.time())

    async def _offer_prefills(self, request: Request) -> _Offered | None:
        """One round over the prefills, fewest open calls first; None: all are busy.

        Raises:
            InstanceError: none is busy, but every one failed.
        """
        loop = asyncio.get_running_loop()
        failure: errors.InstanceError | None = None
        busy = False
        for instance in _ranked(self._prefills):
            offered = loop.time()
            call = instance.call(
                messages.PrefillRequest(
                    id=self._call_id(),
                    prompt=request.prompt,
                    sampling=request.sampling,
                    tenant=request.tenant,
                    deadline_ms=(request.deadline - offered) * 1e3,
                    layered=self._meetings.layered(instance.name, request.prompt_tokens),
                )
            )
            self._metrics.add("pdserve_forward_attempts")
            try:
                reply = await call.reply(ANSWER_S)
            except errors.InstanceError as error:
                failure = error
                self._metrics.add("pdserve_retries_total", phase="offer", reason="error")
                self._meetings.forget(instance)
                call.close()
                continue
            except BaseException:
                call.close()
                raise
            if isinstance(reply, Busy):
                busy = True
                self._metrics.add("pdserve_prefill_rejections_total", instance=instance.name)
                call.close()
                continue
            request.to(State.PREFILLING)
            request.prefill = instance.name
            request.forwarded = offered
            return _Offered(instance, call, reply)
        if failure is not None and not busy:
            raise failure
        return None

    # ------------------------------------------------------------------- decode

    async def _decode(self, request: Request, computed: _Computed) -> AsyncGenerator[Chunk, None]:
        """Hand the KV cache to an idle decode and pass its tokens on."""
        loop = asyncio.get_running_loop()
        decode, call, reply = computed.decode or await self._reserve_decode(request, computed)
        request.to(State.TRANSFERRING)
        request.decode = decode.name
        try:
            while True:
                while isinstance(reply, Accepted):
                    reply = await call.reply(self._stall_s)
                if not isinstance(reply, Tokens):
                    raise _error(reply)
                if reply.start != request.output_tokens:
                    raise errors.InstanceError(
                        f"{request.decode} sent token {reply.start} after {request.output_tokens}"
                    )
                if reply.pulled is not None:
                    request.to(State.DECODING)
                    request.pulled = reply.pulled
                    # The KV cache has left the prefill: its slot is free.
                    computed.call.done = True
                    computed.call.close()
                    self._for_prefill.wake()
                ids: list[int] = np.frombuffer(reply.ids, "<i4").tolist()
                request.output_tokens += len(ids)
                reason: FinishReason = reply.finish_reason  # type: ignore[assignment]
                yield Chunk(ids, reason)
                if reason or request.answer_ended:
                    request.finish(reason, loop.time())
                    return
                reply = await call.reply(self._stall_s)
        finally:
            call.close()
            self._for_decode.wake()

    async def _reserve_decode(self, request: Request, computed: _Computed) -> _Offered:
        """Offer the KV cache to the decodes until one takes it; the prefill holds it meanwhile."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._lease_s
        prefill, token, handle = computed.prefill, computed.result.token, computed.handle
        if not len(self._for_decode):
            taken = await self._offer_decodes(request, prefill, token, handle)
            if taken:
                return taken
        place = self._for_decode.join(request.priority, request.arrived)
        try:
            while await place.turn(limit):
                taken = await self._offer_decodes(request, prefill, token, handle)
                if taken:
                    return taken
        finally:
            place.leave()
        raise errors.Unavailable(f"no idle decode within {self._lease_s:g} s")

    async def _offer_decodes(
        self, request: Request, prefill: Instance, token: int | None, handle: bytes
    ) -> _Offered | None:
        """One round over the decodes that reach the prefill, fewest open calls first.

        None: all of them are full.

        Raises:
            InstanceError: one failed; it may have begun to pull, so no other can be asked.
            Unavailable: none reaches the prefill.
        """
        refusals = {}
        for instance in _ranked(self._decodes):
            refusal = self._meetings.refusal(prefill.name, instance.name)
            if refusal is not None:
                refusals[instance.name] = refusal
                continue
            call, reply = await self._offer_decode(request, instance, token, handle)
            if isinstance(reply, Stranger):
                call.close()
                await self._meetings.introduce(prefill, instance)
                call, reply = await self._offer_decode(request, instance, token, handle)
            if not isinstance(reply, Busy):
                return _Offered(instance, call, reply)
            call.close()
        if len(refusals) == len(self._decodes):
            raise errors.Unavailable(f"no decode reaches {prefill.name}: {refusals}")
        return None

    async def _offer_decode(
        self, request: Request, instance: Instance, token: int | None, handle: bytes
    ) -> tuple[Call, messages.Reply]:
        call = instance.call(
            messages.DecodeRequest(
                id=self._call_id(),
                prompt=request.prompt,
                first_token=token,
                handle=handle,
                sampling=request.sampling,
                tenant=request.tenant,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                min_interval_ms=0.0 if request.stream else UNREAD_INTERVAL_MS,
            )
        )
        try:
            return call, await call.reply(ANSWER_S)
        except BaseException:
            self._meetings.forget(instance)
            call.close()
            raise

    # --------------------------------------------------------------------- both

    def _call_id(self) -> str:
        self._calls += 1
        return f"{self._unique}-{self._calls}"

    def _account(self, request: Request) -> None:
        scenario = request.scenario
        outcome = request.finish_reason or request.state.name.lower()
        self._metrics.add("pdserve_requests_total", scenario=scenario, outcome=outcome)
        if request.first_token:
            ttft = request.first_token - request.arrived
            self._metrics.observe("pdserve_ttft_seconds", ttft, scenario=scenario)
        if request.state is State.FINISHED:
            e2e = request.ended - request.arrived
            self._metrics.observe("pdserve_e2e_seconds", e2e, scenario=scenario)
            if request.output_tokens > 1:
                tpot = (request.ended - request.first_token) / (request.output_tokens - 1)
                self._metrics.observe("pdserve_tpot_seconds", tpot, scenario=scenario)


def _ranked(instances: Sequence[Instance]) -> list[Instance]:
    """Whom to ask: fewest open calls first; those that have just failed only if all have."""
    now = asyncio.get_running_loop().time()
    sound = [instance for instance in instances if now >= instance.suspect_until]
    return sorted(sound or instances, key=lambda instance: instance.open)


def _end(state: State, error: BaseException) -> State:
    """How a request ends that ``error`` stopped in ``state``."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return State.CANCELLED
    if isinstance(error, _Late):
        return State.EXPIRED
    if state in (State.WAITING, State.PREFILLING) and isinstance(
        error, errors.Unavailable | errors.InvalidRequest
    ):
        return State.REJECTED
    return State.FAILED


def _error(reply: messages.Reply) -> errors.PDServeError:
    """What an instance's refusal to go on becomes for the client."""
    if isinstance(reply, Failed):
        for kind in (errors.InvalidRequest, errors.Unavailable, errors.Cancelled):
            if reply.code == kind.code:
                return kind(reply.message)
        return errors.InstanceError(reply.message)
    return errors.InstanceError(f"unexpected {type(reply).__name__} from an instance")
