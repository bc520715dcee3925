"""From a waiting request to a first token and a KV cache that waits in a prefill."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from pdserve import errors
from pdserve.latency_estimate import LatencyEstimate
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.messages import Accepted, Prefilled
from pdserve.scheduling.candidates import Rank
from pdserve.scheduling.decode_stage import DecodeStage
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Call, Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.load import Load
from pdserve.scheduling.offering import Calls, Offered, failure, offer
from pdserve.scheduling.prefix_directory import NOTHING, SOME, Cached, PrefixDirectory, digests
from pdserve.scheduling.request import RECOVER_S, Request, State
from pdserve.scheduling.suspicion import admits
from pdserve.scheduling.wait_queue import Order


class Computed(NamedTuple):
    """The result of a prefill: a prompt's KV cache that the prefill holds."""

    prefill: Instance
    call: Call
    result: Prefilled
    handle: bytes
    decode: Offered | None
    """The decode that has pulled the KV cache during the computation, if any."""
    prefills: Forwarding[Offered]
    """The forwarding whose requests may wait for the prefill's slot."""

    def transferred(self) -> None:
        """Note that the KV cache has left the prefill, which frees its slot."""
        self.call.transferred(tell=self.result.unseen)
        self.prefills.freed(self.prefill)

    def close(self) -> None:
        self.call.close()
        self.prefills.freed(self.prefill)


class PrefillStage:
    """The prefills of a group.

    Args:
        forwarding: offers requests to the prefills.
        stall_s: seconds of silence after which a prefill counts as failed.
    """

    def __init__(
        self,
        forwarding: Forwarding[Offered],
        decode_stage: DecodeStage,
        kv_links: KVLinks,
        calls: Calls,
        metrics: Registry,
        stall_s: float,
    ) -> None:
        self.forwarding = forwarding
        self._members = {one.name: one for one in forwarding.instances}
        self._decode_stage = decode_stage
        self._kv_links = kv_links
        self._calls = calls
        self._metrics = metrics
        self._stall_s = stall_s
        self._prefixes = PrefixDirectory()
        self._latency = LatencyEstimate()
        """Estimate of the time from an offer to the first token. A waiting request whose first
        token would come after its limit could only be computed in vain, in the place of one that is
        in time; if no other request waits, it waits somewhat longer. The estimate is used only for
        leaving the queue: a request that finds an idle prefill is computed whatever the estimate,
        so that a wrong estimate is corrected and refuses no request that a prefill could serve."""

    def update(self, prefills: Sequence[Instance]) -> None:
        """Replace the prefills; what is known of those that stay is kept.

        Waiting requests are offered to those that have joined.
        """
        for gone in set(self._members.values()).difference(prefills):
            self._prefixes.forget(gone.name)
        self._members = {one.name: one for one in prefills}
        self.forwarding.update(prefills)

    def place(self, request: Request, tokens: int) -> tuple[Order, float, float]:
        """Return a request's place in the wait queue, and when it gives up waiting.

        Args:
            tokens: tokens that the prefill with the longest cached prefix would have to compute.

        Returns:
            Its order among the waiting requests; the seconds before its limit at which it leaves
            while others wait, and those if no other does.
        """
        return request.order, self._latency.expected(tokens), self._latency.usual(tokens)

    async def compute(self, request: Request) -> Computed:
        """Wait for an idle prefill and for its result.

        Raises:
            InvalidRequest: no arena can ever hold the prompt.
            Late: no prefill was idle, or the first token did not come, within the request's limit.
            InstanceError: the prefill that accepted the request has failed.
        """
        cached = self._cached(request)
        tokens = request.tokens_so_far

        def uncached(prefill: Instance) -> int:
            return tokens - cached.tokens(prefill.name)

        def cost(prefill: Instance) -> float | None:
            now = asyncio.get_running_loop().time()
            if prefill.name in self._kv_links.table.avoided:
                return None
            if not admits(prefill, request, "prefill", now):
                return None
            # The tokens that the prefill computes for this gateway already, plus this request's
            # uncached tokens; among equals the prefill with the fewest open calls.
            return prefill_load(prefill.load) + uncached(prefill)

        def special() -> list[Instance]:
            members = self._members
            return [members[name] for name in cached.some if name in members]

        charged = 0

        async def ask(prefill: Instance, hurry: bool) -> Offered | None:
            nonlocal charged
            # Requests that arrive at the same moment count this one, though it is not accepted yet.
            prefill.load.add_tokens(charged := uncached(prefill))
            taken = None
            try:
                taken = await self._offer(request, prefill, hurry)
            finally:
                if taken is None:
                    prefill.load.add_tokens(-charged)
            return taken

        order, takes, alone = self.place(request, tokens - cached.most)
        limit = request.deadline
        rank = Rank(cost, special, look=1 if cached.all else SOME)
        taken = await self.forwarding.take(order, limit - takes, rank, ask, limit - alone)
        if taken is None:
            raise late(self.forwarding.why_not(), request, takes)
        request.attempts += 1
        offered = request.offers[-1].began
        try:
            computed = await self._result(request, taken)
        finally:
            taken.instance.load.add_tokens(-charged)
        now = asyncio.get_running_loop().time()
        result, name = computed.result, taken.instance.name
        self._latency.saw(tokens - result.cached_tokens, now - offered)
        told = digests(request.so_far, request.tenant)
        if self._members.get(name) is taken.instance:
            self._prefixes.correct(name, told, result.cached_tokens, cached.tokens(name))
            self._prefixes.stored(name, result.stored)
        return computed

    async def _offer(self, request: Request, prefill: Instance, hurry: bool) -> Offered | None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now > request.deadline:  # the loop has been busy since the limit was checked
            raise late(self.forwarding.why_not(), request)
        message = messages.PrefillRequest(
            id=self._calls.new(request),
            prompt=request.so_far,
            sampling=request.sampling,
            tenant=request.tenant,
            deadline_ms=(request.deadline - now) * 1e3,
            resumed_tokens=request.output_tokens,
            gateway=self._calls.gateway,
            hurry=hurry,
            layered=self._kv_links.layered(prefill.name, request.prompt_tokens),
            only=request.max_tokens - request.output_tokens == 1,
            ignore_eos=request.ignore_eos,
            suspect=bool(request.ends["prefill"]),
            trace=request.trace,
        )
        self._metrics.add(catalogue.FORWARD_ATTEMPTS, 1)
        try:
            taken = await offer(request, prefill, message, request.deadline)
        except errors.Late as error:
            what = self.forwarding.all_failed() or f"no answer of {prefill.name}"
            raise late(what, request) from error
        except errors.Drained:
            raise
        except errors.InstanceError:
            self._metrics.add(catalogue.RETRIES, 1, phase="offer", reason="error")
            self._kv_links.forget(prefill)
            self._prefixes.forget(prefill.name)
            raise
        if taken is None:
            self._metrics.add(catalogue.PREFILL_REJECTIONS, 1, instance=prefill.name)
            return None
        request.to(State.PREFILLING, loop.time())
        request.prefill = prefill.name
        request.forwarded = request.forwarded or now
        return taken

    async def _result(self, request: Request, taken: Offered) -> Computed:
        prefill, call, reply = taken
        handle, decode = b"", None
        try:
            while isinstance(reply, Accepted):
                if reply.handle is not None:
                    handle = reply.handle
                    decode = await self._decode_stage.follow(request, prefill, handle)
                else:
                    self._decode_stage.prepare(prefill)
                reply = await call.reply(self._stall_s, request.ends_by)
            if isinstance(reply, Prefilled):
                prefill.breaker.good()
                call.computed()
                self.forwarding.freed(prefill)
                handle = handle or reply.handle
                if not handle:  # to a decode, none means that it computes the prompt
                    raise errors.InstanceError(f"{prefill.name}: the handle was lost on the way")
                return Computed(prefill, call, reply, handle, decode, self.forwarding)
            error = failure(reply)
            if isinstance(error, errors.Drained):
                pass
            elif isinstance(error, errors.InstanceError):
                call.blame()
            elif isinstance(error, errors.Unavailable):
                error = late("no first token", request)
            raise error
        except BaseException:
            if decode is not None:
                self._decode_stage.let_go(decode)
            call.close()
            self.forwarding.freed(prefill)
            raise

    def _cached(self, request: Request) -> Cached:
        """Return how many of the request's tokens each prefill is believed to have cached."""
        if request.sampling.reproducible:  # it is computed from the first token
            return NOTHING
        return self._prefixes.cached(digests(request.so_far, request.tenant))


def prefill_load(load: Load) -> float:
    """Return a prefill's load: the tokens that it computes for this gateway, then open calls."""
    return load.tokens + load.open / (load.open + 1)


def late(what: str, request: Request, takes: float = 0.0) -> errors.Late:
    """Return the error of a request whose limit has passed, or cannot be met any more.

    Args:
        takes: estimated seconds of its prefill.
    """
    waited = asyncio.get_running_loop().time() - request.waiting_since
    more = f"; a prefill would take {takes * 1e3:.0f} ms" if takes else ""
    limit = f"the TTFT limit of {request.ttft_limit_s * 1e3:g} ms"
    if request.ttft_limit_of:
        limit += f" of {request.ttft_limit_of}"
    if request.deadline == request.ends_by:
        limit = f"its time limit of {request.time_limit_s:g} s"
    elif request.output:
        limit = f"the {RECOVER_S:g} s for another pair to go on"
    return errors.Late(f"{what} within {limit} ({waited * 1e3:.0f} ms waited{more})")
