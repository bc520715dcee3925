"""From a KV cache that waits in a prefill to a decode that generates the rest of the answer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.messages import NotConnected
from pdserve.scheduling.candidates import Rank
from pdserve.scheduling.circuit_breaker import CircuitBreaker
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.offering import Calls, Offered, offer
from pdserve.scheduling.pairs import Pairs
from pdserve.scheduling.prefix_directory import NOTHING, PrefixDirectory, digests
from pdserve.scheduling.request import Request
from pdserve.scheduling.room import Promise
from pdserve.scheduling.rooms import Rooms
from pdserve.scheduling.suspicion import admits

# Replies of an answer that is not streamed; frequent enough to show that the instance is alive.
UNREAD_INTERVAL_MS = 1000.0
# Longest wait of a request for a link between two instances, since it may go on without it.
LINK_WAIT_S = 5.0
# One more stream on a decode costs as much as a transfer of this length.
STREAM_S = 0.02


class NoRoom(errors.Unavailable):
    """No decode has accepted a KV cache for as long as its prefill keeps it."""


class DecodeStage:
    """The decodes of a group.

    Args:
        lease_s: seconds for which a prefill keeps a KV cache that no decode has taken.
    """

    def __init__(
        self,
        decodes: Forwarding[Offered],
        kv_links: KVLinks,
        calls: Calls,
        metrics: Registry,
        lease_s: float,
        rooms: Rooms,
    ) -> None:
        self.decodes = decodes
        self._members = {one.name: one for one in decodes.instances}
        self._rooms = rooms
        self._kv_links = kv_links
        self._calls = calls
        self._metrics = metrics
        self._lease_s = lease_s
        self._prefixes = PrefixDirectory()
        self._pairs = Pairs[CircuitBreaker]()

    def update(self, decodes: Sequence[Instance], at_once: int) -> None:
        """Replace the decodes; what is known of those that stay is kept.

        Args:
            at_once: see ``Rooms``.
        """
        for gone in set(self.decodes.instances).difference(decodes):
            self._prefixes.forget(gone.name)
        self._members = {one.name: one for one in decodes}
        self._rooms.update(decodes, at_once)
        self.decodes.update(decodes)

    def let_go_of(self, name: str) -> None:
        """Forget the pairs of a prefill or decode that has left and serves no request any more."""
        self._pairs.drop(name)

    async def promise(self, request: Request) -> Promise | None:
        """Promise a request room in a decode before its prompt is computed; wait if there is none.

        Returns None if there was no room before the request's deadline.

        Raises:
            Unavailable: too many requests wait.
        """
        only = request.max_tokens - request.output_tokens == 1
        blocks = self._rooms.need(request.prompt_tokens + request.max_tokens)
        if only or not blocks:
            return Promise(None, 0)

        def find() -> Promise | None:
            decode = self._rooms.find(blocks, asyncio.get_running_loop().time())
            return None if decode is None else Promise(decode.room, blocks, self.decodes.told)

        return await self.decodes.look(request.order, request.deadline, find)

    def plenty(self, age_s: float) -> bool:
        """Tell whether all requests that may come find room, by reports of the last `age_s` s."""
        return self._rooms.plenty(asyncio.get_running_loop().time(), age_s)

    async def reserve(
        self, request: Request, prefill: Instance, token: int, handle: bytes, until: float
    ) -> Offered:
        """Find an idle decode that accepts the KV cache.

        The prefill keeps it and its slot meanwhile.

        Args:
            until: the request's own time limit (``loop.time()``).

        Raises:
            InvalidRequest: no decode can ever hold the request.
            Unavailable: no decode reaches the prefill; or all decodes have failed, and the client
                has a token already.
            NoRoom: no decode was idle in time.
        """
        self._check_reach(prefill)
        kept_until = asyncio.get_running_loop().time() + self._lease_s

        async def ask(decode: Instance, _hurry: bool) -> Offered | None:
            return await self._hand_over(request, prefill, decode, token, handle)

        rank = self._rank(request, prefill)
        taken = await self.decodes.take(request.order, min(kept_until, until), rank, ask)
        if taken is None and until <= kept_until:
            raise errors.Late("the request's own time limit has passed")
        if taken is None:
            # If its client has no token yet, the request may wait for a decode to recover, within
            # its limit.
            told = request.output_tokens > request.held_back
            kind = errors.Unavailable if told and self.decodes.all_failed() else NoRoom
            raise kind(f"{self.decodes.why_not()} within {self._lease_s:g} s")
        return taken

    async def follow(self, request: Request, prefill: Instance, handle: bytes) -> Offered | None:
        """Find a decode that pulls the KV cache while it is being computed; None: all are busy."""

        async def ask(decode: Instance, _hurry: bool) -> Offered | None:
            return await self._hand_over(request, prefill, decode, None, handle)

        return await self.decodes.once(self._rank(request, prefill), ask)

    async def alone(self, request: Request, short: float, congested: bool) -> Offered | None:
        """Find a decode that computes the prompt itself; None: none should, or all are busy.

        Args:
            short: largest number of uncached tokens that a decode should compute.
            congested: a decode without open requests should compute the prompt whatever its length.
        """
        told = digests(request.so_far, request.tenant)
        cached = self._prefixes.cached(told) if request.tokens_so_far > short else NOTHING

        async def ask(decode: Instance, _hurry: bool) -> Offered | None:
            return await self._offer(request, decode, None, b"")

        def cost(decode: Instance) -> float | None:
            now = asyncio.get_running_loop().time()
            if not admits(decode, request, "decode", now):
                return None
            uncached = request.tokens_so_far - cached.tokens(decode.name)
            if uncached <= short or (congested and not decode.load.open):
                return decode.load.open
            return None

        def special() -> list[Instance]:
            return [self._members[name] for name in cached.some if name in self._members]

        most = math.inf if request.tokens_so_far <= short else 0.0 if congested else -1.0
        return await self.decodes.once(Rank(cost, special, most), ask)

    def decoded(self, request: Request, decode: Instance) -> None:
        """Note that a decode has cached a finished answer, but for its last token."""
        if self._members.get(decode.name) is decode and not request.sampling.reproducible:
            told = digests(request.so_far, request.tenant)
            self._prefixes.stored(decode.name, b"".join(told))

    def let_go(self, taken: Offered) -> None:
        """Release a decode that is not wanted any more; calling it again is no error."""
        taken.call.close()
        self.decodes.freed(taken.instance)

    def handed_over(self, prefill: str, decode: str) -> None:
        if (breaker := self._pairs.known.get((prefill, decode))) is not None:
            breaker.good()

    def not_handed_over(self, prefill: str, decode: str) -> None:
        """Note that a transfer between these two failed, whichever of them is to blame."""
        if (breaker := self._pairs.known.get((prefill, decode))) is None:
            self._pairs[prefill, decode] = breaker = CircuitBreaker()
        breaker.failed(asyncio.get_running_loop().time())

    def _check_reach(self, prefill: Instance) -> None:
        if refusals := self._kv_links.table.unreachable(prefill.name):
            raise errors.Unavailable(f"no decode reaches {prefill.name}: {refusals}")

    def prepare(self, prefill: Instance) -> None:
        """Link an idle decode to a prefill that has begun to compute a prompt."""
        self._linked(prefill)

    def _linked(self, prefill: Instance) -> Sequence[Instance]:
        """Return the decodes to offer a prefill's KV caches: in a large group, those linked to it.

        If none of them can be offered one, another decode is linked in the background.
        """
        if self._kv_links.table.dense:
            return self.decodes.instances
        linked = self._kv_links.decodes(prefill.name)
        candidates = self.decodes.candidates
        if not any(map(candidates.usable, linked)):
            other = candidates.best(Rank(partial(self._other, prefill)))
            if other is not None:
                self._kv_links.connect(prefill, other)
        return linked

    def _other(self, prefill: Instance, decode: Instance) -> float | None:
        return None if self._kv_links.table.refusal(prefill.name, decode.name) else decode.load.open

    def _rank(self, request: Request, prefill: Instance) -> Rank:
        """Rank the decodes that are linked to a prefill, or all if none is linked."""
        cost = partial(self._cost, request, prefill)
        return Rank(cost, lambda: self._linked(prefill), only=True)

    def _cost(self, request: Request, prefill: Instance, decode: Instance) -> float | None:
        """Return the open streams, plus the transfer's estimated duration in streams."""
        pair = prefill.name, decode.name
        now = asyncio.get_running_loop().time()
        if decode.name in self._kv_links.table.avoided or self._kv_links.table.refusal(*pair):
            return None
        breaker = self._pairs.known.get(pair)
        if breaker is not None and not breaker.allows(now, 0):
            return None
        if request.ends["decode"] and not admits(decode, request, "decode", now):
            return None
        transfer_s = self._kv_links.table.transfer_s(*pair, request.prompt_tokens)
        return decode.load.open + math.floor(transfer_s / STREAM_S)

    async def _hand_over(
        self,
        request: Request,
        prefill: Instance,
        decode: Instance,
        token: int | None,
        handle: bytes,
    ) -> Offered | None:
        taken = await self._offer(request, decode, token, handle)
        if taken is None or not isinstance(taken.reply, NotConnected):
            return taken
        taken.call.close()
        until = request.deadline if token is None else request.ends_by
        left = until - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(
                self._kv_links.connect_now(prefill, decode), min(left, LINK_WAIT_S)
            )
        except errors.Drained:
            raise
        except (errors.InstanceError, asyncio.TimeoutError) as error:
            self.not_handed_over(prefill.name, decode.name)
            self._check_reach(prefill)
            if isinstance(error, errors.InstanceError):
                raise
            raise errors.InstanceError(
                f"{decode.name} has not connected to {prefill.name} in time"
            ) from error
        if self._members.get(decode.name) is not decode:  # it has left the group meanwhile
            return None
        return await self._offer(request, decode, token, handle)

    async def _offer(
        self, request: Request, decode: Instance, token: int | None, handle: bytes
    ) -> Offered | None:
        told = 0 if token is None else 1
        message = messages.DecodeRequest(
            id=self._calls.new(request),
            prompt=request.so_far[: -4 * told or None],
            first_token=token,
            handle=handle,
            sampling=request.sampling,
            tenant=request.tenant,
            max_tokens=request.max_tokens - request.output_tokens + told,
            ignore_eos=request.ignore_eos,
            min_interval_ms=0.0 if request.stream else UNREAD_INTERVAL_MS,
            hurry=request.held_back,
            resumed_tokens=request.output_tokens - told,
            peers=min(len(self._members), messages.MAX_PEERS),
            suspect=bool(request.ends["decode"]),
            trace=request.trace,
        )
        # If the first token does not come in time, the request is not worth waiting for.
        until = request.ends_by if told else request.deadline
        try:
            taken = await offer(request, decode, message, until)
        except errors.Drained:
            raise
        except errors.InstanceError:
            self._kv_links.forget(decode)
            self._prefixes.forget(decode.name)
            raise
        if taken is None:
            self._metrics.add(catalogue.DECODE_REJECTIONS, 1, instance=decode.name)
        else:
            request.promise.over()
        return taken
