"""The life of a request: an idle prefill, the first token, an idle decode, the other tokens.

If anything fails on the way, the request goes on with another pair from the tokens that its client
has, as long as attempts are left: the KV cache is computed again, or found as a prefix.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pdserve import config, errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Accepted, Tokens
from pdserve.scheduling.circuit_breaker import RetryBudget
from pdserve.scheduling.decode_stage import DecodeStage, NoRoom
from pdserve.scheduling.first_token import FirstTokens
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.offering import Calls, Offered, failure
from pdserve.scheduling.outcome import account, final_state
from pdserve.scheduling.prefill_stage import Computed, PrefillStage, late, prefill_load
from pdserve.scheduling.request import FINAL, Chunk, FinishReason, Request, State
from pdserve.scheduling.rooms import KNOWN_S, Rooms

ATTEMPTS = 4
"""Number of pairs that may take a request: one that fails again and again is at fault itself."""
MOVES = 16
"""Number of times that a request goes on elsewhere since an instance has left it, which is no
attempt; after one more it ends. An instance leaves once in minutes."""


class Scheduler:
    """Serves any number of requests at once over one group: a set of prefills and decodes.

    Args:
        kv_links: links of the same instances.
        rng: source of jitter.
    """

    def __init__(
        self,
        prefills: Sequence[Instance],
        decodes: Sequence[Instance],
        kv_links: KVLinks,
        metrics: Registry,
        *,
        gateway: config.Gateway,
        prefill: config.Prefill,
        decode: config.Decode,
        rng: random.Random,
    ) -> None:
        self._metrics = metrics
        self._stall_s = gateway.stall_s
        self._local = gateway.local
        self._local_tokens = gateway.local_tokens
        self._calls = calls = Calls(rng)
        self._slots = slots = prefill.slots
        batch = min(prefill.batch, slots)
        self.prefills = Forwarding[Offered](
            prefills, "prefill", prefill_load, calls.gateway, slots, batch, rng
        )
        slots = decode.slots
        self.decodes = Forwarding[Offered](
            decodes, "decode", lambda of: of.open, calls.gateway, slots, slots, rng
        )
        rooms = Rooms(decodes, decode.blocks, decode.block_size, self._at_once)
        self._decode_stage = DecodeStage(
            self.decodes, kv_links, calls, metrics, prefill.kept_s, rooms
        )
        self._first_tokens = FirstTokens(self._decode_stage)
        self._prefill_stage = PrefillStage(
            self.prefills, self._decode_stage, kv_links, calls, metrics, gateway.stall_s
        )
        kv_links.changed = self.links_changed
        self._kv_links = kv_links
        self._budget = RetryBudget()

    @property
    def _at_once(self) -> int:
        """Return the number of requests that may come out of all prefills together."""
        return len(self.prefills.instances) * self._slots

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Replace the instances.

        Waiting requests are offered to instances that have joined, and no longer to those that have
        left, which finish what they have begun. What is known of the others is kept: prefixes,
        links, circuit breakers, latencies, and the retry budget.
        """
        names = {one.name for one in (*prefills, *decodes)}
        moved = {
            one.name
            for one in {*self.prefills.instances, *self.decodes.instances}.difference(
                prefills, decodes
            )
            if one.name in names
        }
        self._kv_links.update(prefills, decodes)
        self._prefill_stage.update(prefills)
        self._decode_stage.update(decodes, self._at_once)
        for name in moved:
            self._decode_stage.let_go_of(name)

    def let_go(self, instance: Instance) -> None:
        """Forget an instance that has left and serves no request any more."""
        self._kv_links.let_go(instance)
        if all(
            one.name != instance.name for one in (*self.prefills.instances, *self.decodes.instances)
        ):
            self._decode_stage.let_go_of(instance.name)

    def show(self, gateway: str, group: str) -> None:
        """Set the metrics of the requests that wait."""
        self.prefills.show(self._metrics, gateway, group)
        self.decodes.show(self._metrics, gateway, group)

    def links_changed(self) -> None:
        """Wake the queues: their first requests may be able to use an instance or a pair of them
        that they could not use before."""
        self.prefills.wake()
        self.decodes.wake()

    @property
    def healthy(self) -> bool:
        """Tell whether it has a prefill and a decode that have not failed."""
        now = asyncio.get_running_loop().time()
        return all(
            any(one.breaker.allows(now, 0) for one in role)
            for role in (self.prefills.instances, self.decodes.instances)
        )

    async def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it comes; closing the iterator early cancels the request.

        Raises:
            InvalidRequest: no instance can ever hold the request.
            Unavailable: no prefill or no decode accepted it within the limit; or MOVES instances
                have left it.
            InstanceError: an instance failed and no other could go on.
            Suspected: two instances have ended while they served it.
        """
        loop = asyncio.get_running_loop()
        request.arrived = request.waiting_since = loop.time()
        self._budget.earn()
        try:
            async with aclosing(self._run(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except BaseException as error:
            if request.state not in FINAL:
                request.to(final_state(request.state, error), loop.time())
            raise
        finally:
            request.ended = loop.time()
            account(request, self._metrics)

    def prefill_stage(self, request: Request) -> PrefillStage:
        """Return the stage that computes this request's prompt; a subclass may have several."""
        return self._prefill_stage

    async def _run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        while True:
            try:
                async with aclosing(self._attempt(request)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except NoRoom:
                # If its client has no token, the request goes on waiting within its limit;
                # otherwise it has as many attempts as if an instance had failed.
                if request.output and request.attempts >= ATTEMPTS:
                    raise
                if not request.output:
                    request.attempts -= 1
                self._metrics.add(catalogue.RETRIES, 1, phase="decode", reason="busy")
                request.again(asyncio.get_running_loop().time())
                continue
            except errors.Drained as error:
                reason = "drained"
                if request.moves >= MOVES:
                    raise errors.Unavailable(f"{MOVES} instances have left: {error}") from error
                request.moves += 1
                request.attempts -= 1
            except errors.InstanceError:
                reason = "error"
                if request.attempts >= ATTEMPTS or not self._budget.spend():
                    raise
            phase = "decode" if request.output else "prefill"
            self._metrics.add(catalogue.RETRIES, 1, phase=phase, reason=reason)
            request.again(asyncio.get_running_loop().time())

    async def _attempt(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Serve the request with one pair, from its tokens so far to the end."""
        alone = await self._alone(request)
        if alone is not None:
            async with aclosing(self._decode(request, alone, None)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        promise = await self._decode_stage.promise(request)
        if promise is None:
            raise late("no decode with room", request)
        request.promise = promise
        try:
            computed = await self.prefill_stage(request).compute(request)
            try:
                request.to(State.PREFILLED, asyncio.get_running_loop().time())
                async with aclosing(self._computed(request, computed)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            finally:
                if computed.decode is not None:
                    self._decode_stage.let_go(computed.decode)
                computed.close()
        finally:
            promise.over()

    async def _computed(self, request: Request, computed: Computed) -> AsyncGenerator[Chunk, None]:
        """Serve the request from its computed prompt to the end."""
        loop, decode, reserving = asyncio.get_running_loop(), computed.decode, None
        first = self._first_tokens.take(request, computed)
        if not (decode or first.finish_reason or self._decode_stage.plenty(KNOWN_S)):
            reserving = await self._first_tokens.hold_back(request, computed)
        try:
            yield first
            if request.ended_by(first, loop.time()):
                return
            if decode is None:
                decode = await (reserving or self._first_tokens.reserve(request, computed))
            async with aclosing(self._decode(request, decode, computed)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            if decode is not None:
                self._decode_stage.let_go(decode)
            elif reserving is not None:
                self._first_tokens.give_up(reserving)

    async def _alone(self, request: Request) -> Offered | None:
        """Find a decode that computes prompt and answer, if that is faster than a prefill."""
        if self._local == "off" or request.sampling.reproducible:
            return None
        short = math.inf if self._local == "on" else self._local_tokens
        congested = self.prefill_stage(request).forwarding.congested
        taken = await self._decode_stage.alone(request, short, congested)
        if taken is not None:
            request.attempts += 1
            request.forwarded = request.forwarded or asyncio.get_running_loop().time()
        return taken

    # ------------------------------------------------------------------- decode

    async def _decode(
        self, request: Request, taken: Offered, computed: Computed | None
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the tokens of a decode that has pulled the KV cache, or computes it."""
        loop = asyncio.get_running_loop()
        decode, call, reply = taken
        begun = request.output_tokens - (computed is not None)
        request.to(State.DECODING if computed is None else State.TRANSFERRING, loop.time())
        request.decode = decode.name
        try:
            while True:
                while isinstance(reply, Accepted):
                    reply = await call.reply(self._stall_s, request.ends_by)
                if not isinstance(reply, Tokens):
                    raise self._refused(request, taken, computed, failure(reply))
                if begun + reply.start != request.output_tokens:
                    raise errors.InstanceError(
                        f"{decode.name} sent token {begun + reply.start} "
                        f"after {request.output_tokens}"
                    )
                if reply.transfer is not None:
                    self._arrived(request, taken, computed)
                    request.transfer = reply.transfer
                    if computed is None and not request.first_token:
                        request.cached_tokens = reply.transfer.cached
                        request.prefill_ms = reply.transfer.ms
                if computed is None and not reply.start and loop.time() > request.deadline:
                    raise late("no first token", request)
                request.first_token = request.first_token or loop.time()
                reason: FinishReason = reply.finish_reason  # type: ignore[assignment]
                chunk = Chunk(request.add(reply.ids), reason)
                yield chunk
                if self._ends(request, chunk, decode):
                    return
                reply = await call.reply(self._stall_s, request.ends_by)
        finally:
            self._decode_stage.let_go(taken)

    def _ends(self, request: Request, chunk: Chunk, decode: Instance) -> bool:
        """Tell whether the answer has ended with this chunk."""
        if not request.ended_by(chunk, asyncio.get_running_loop().time()):
            return False
        if self._local == "auto":
            self._decode_stage.decoded(request, decode)
        return True

    def _arrived(self, request: Request, taken: Offered, computed: Computed | None) -> None:
        """Note that the KV cache has left the prefill, which frees its slot."""
        taken.instance.breaker.good()
        if taken.call.stay.suspect:
            self.decodes.freed(taken.instance)
        if computed is not None:
            request.to(State.DECODING, asyncio.get_running_loop().time())
            self._decode_stage.handed_over(computed.prefill.name, taken.instance.name)
            computed.transferred()

    def _refused(
        self,
        request: Request,
        taken: Offered,
        computed: Computed | None,
        error: errors.PDServeError,
    ) -> errors.PDServeError:
        """Note that the decode has refused to go on; return why.

        If it is no choice of its own, it has failed at this request, or could not pull its KV
        cache, unless that has left with its prefill.
        """
        if isinstance(error, errors.Drained) or not isinstance(error, errors.InstanceError):
            return error
        if computed is not None and request.state is State.TRANSFERRING:
            if computed.prefill.left:
                return errors.Drained(f"{computed.prefill.name} has left: {error}")
            self._decode_stage.not_handed_over(computed.prefill.name, taken.instance.name)
        else:
            taken.call.blame()
        return error
