"""Links from decodes to the memory of prefills, made before a request needs them.

The pairs of a plan (``link_plan``) are connected as soon as they can be, and again when either of
them has restarted; a decode opens, probes and warms its link then, and not with the first request.
Other pairs are connected while a prompt is computed, if no linked decode is idle.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Connect, Connected, Describe, Described
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.link_plan import PEERS, Ring
from pdserve.scheduling.pairs import Pair, Pairs
from pdserve.supervision import repeat, traced

_log = logging.getLogger(__name__)

ROUND_S = 2.0
# Interval while a planned link is missing: servers that start together are not ready together.
HASTE_S = 0.25
AT_ONCE = 64
"""Prefills that are asked in one round whether their endpoint has changed; the others follow in
turn."""
DESCRIBE_S = 2.0
# A decode probes every transport in turn, which takes seconds for each that does not answer.
CONNECT_S = 20.0
# A shorter transfer is not worth choosing the decode before the prefill has begun: about the time
# that one token takes.
OVERLAP_S = 0.02
LINKS = 6 * PEERS
"""Links of one instance above which none is made on demand any more."""


class KVLinks:
    """Connects the prefills and decodes of one gateway's group.

    Several gateways may connect the same pairs.

    Args:
        gateway, group: names of the gateway's model and of the group, for the metrics.
        layered: whether decodes pull layer by layer; None: only where the transfer would be long.
    """

    def __init__(
        self,
        prefills: Sequence[Instance],
        decodes: Sequence[Instance],
        layered: bool | None,
        gateway: str,
        metrics: Registry,
        group: str = "default",
    ) -> None:
        self._layered = layered
        self._labels = {"gateway": gateway, "group": group}
        self._metrics = metrics
        self._links = Pairs[tuple[bytes, Connected]]()
        """The links that have been made, each with the endpoint that it leads to."""
        self._refused = Pairs[str]()
        self.useless: frozenset[str] = frozenset()
        """Prefills that no decode could connect to, as long as there are others."""
        self._alone: set[str] = set()
        """Prefills that no decode could connect to, whether or not there are others."""
        self.linked: Callable[[], None] = lambda: None
        """Called when a link has been made."""
        self._linking: dict[Pair, asyncio.Task[None]] = {}
        self._on_demand: set[str] = set()
        """Prefills to which a decode is being linked on demand."""
        self._changed = asyncio.Event()
        self._next, self._turn_at = 0, 0.0
        """Index of the prefill that is asked next, and the time of the next turn."""
        self._take(prefills, decodes)

    def _take(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        self._prefills, self._decodes = prefills, decodes
        self._members = {one.name: one for one in (*prefills, *decodes)}
        self._ring = Ring(one.name for one in decodes)
        ring = Ring(one.name for one in prefills)
        self._chosen = defaultdict[str, list[str]](list)
        """For each prefill, the decodes that have chosen it."""
        for decode in decodes:
            for name in itertools.islice(ring.after(decode.name), PEERS):
                self._chosen[name].append(decode.name)
        self.dense = len(prefills) <= PEERS and len(decodes) <= PEERS
        """True if all pairs are planned to be linked."""
        self._planned = {one.name: self._plan(one.name) for one in prefills}
        self._alone = {one.name for one in prefills if self._is_alone(one.name)}
        self._find_useless()

    def _plan(self, prefill: str) -> dict[str, None]:
        """Return the decodes to link to a prefill: those that chose it, and PEERS that reach it."""
        planned = dict.fromkeys(self._chosen[prefill])
        reach = 0
        for name in self._ring.after(prefill):
            planned[name] = None
            reach += (prefill, name) not in self._refused.known
            if reach == PEERS:
                break
        return planned

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Replace the instances; those that have joined are connected at once.

        What is known of those that have left is kept until ``let_go``, since KV caches of theirs
        may still wait to be handed over, unless another instance has taken the name.
        """
        before = {*self._prefills, *self._decodes}
        names = {one.name for one in (*prefills, *decodes)}
        for gone in before.difference(prefills, decodes):
            for pair, task in self._linking.items():
                if gone.name in pair:
                    task.cancel()
            if gone.name in names:
                self._drop(gone.name)
        self._take(prefills, decodes)
        self._changed.set()

    def let_go(self, instance: Instance) -> None:
        """Forget an instance that has left and serves no request, unless its name is taken."""
        if instance.name not in self._members:
            self._drop(instance.name)

    def _drop(self, name: str) -> None:
        self._links.drop(name)
        self._refused.drop(name)

    async def run(self) -> None:
        """Connect the planned pairs that have no link, until cancelled."""
        try:
            await repeat("connecting prefills and decodes", self._connect_all, self._changed)
        finally:
            for task in list(self._linking.values()):
                task.cancel()
            self._tell(connected=0, refused=0, unknown=0)

    async def _connect_all(self) -> float:
        """Run one round; return the seconds until the next."""
        await asyncio.gather(*map(self._round, self._due()))
        connected = sum(pair in self._links.known for pair in self._pairs())
        refused = sum(pair in self._refused.known for pair in self._pairs())
        unknown = sum(map(len, self._planned.values())) - connected - refused
        self._tell(connected=connected, refused=refused, unknown=unknown)
        return HASTE_S if unknown else ROUND_S

    @property
    def missing(self) -> int:
        """Return the number of planned links that have been neither made nor refused."""
        return sum(not self._settled(pair) for pair in self._pairs())

    def __len__(self) -> int:
        """Return the number of links that have been made."""
        return len(self._links)

    def _pairs(self) -> Iterator[Pair]:
        return ((one, other) for one, others in self._planned.items() for other in others)

    def _due(self) -> Sequence[Instance]:
        """Return the prefills to ask in this round: those without a link, and others in turn."""
        if len(self._prefills) <= AT_ONCE:
            return self._prefills
        due = {pair[0] for pair in self._pairs() if not self._settled(pair)}
        now = asyncio.get_running_loop().time()
        if now >= self._turn_at:
            self._turn_at = now + ROUND_S
            begin, self._next = self._next, (self._next + AT_ONCE) % len(self._prefills)
            turn = itertools.islice(itertools.cycle(self._prefills), begin, begin + AT_ONCE)
            due.update(one.name for one in turn)
        return [one for one in self._prefills if one.name in due]

    def _settled(self, pair: Pair) -> bool:
        return pair in self._links.known or pair in self._refused.known

    def _tell(self, **pairs: int) -> None:
        for state, count in pairs.items():
            self._metrics.set(catalogue.KV_LINKS, count, **self._labels, state=state)

    async def _round(self, prefill: Instance) -> None:
        try:
            endpoint = await _describe(prefill)
        except errors.PDServeError:
            return  # not reachable, or not yet
        if self._members.get(prefill.name) is not prefill:  # it has left meanwhile
            return
        for name in self._planned[prefill.name]:
            self._start(prefill, self._members[name], endpoint)
        for name in self._links.others(prefill.name):  # links made on demand
            if (decode := self._members.get(name)) is not None:
                self._start(prefill, decode, endpoint)

    def _start(self, prefill: Instance, decode: Instance, endpoint: bytes) -> None:
        pair = prefill.name, decode.name
        known, _ = self._links.known.get(pair) or (b"", None)
        # A pair that takes long delays no other.
        if pair not in self._linking and known != endpoint:
            task = asyncio.create_task(self._try(prefill, decode, endpoint))
            self._linking[pair] = task
            task.add_done_callback(partial(self._tried, pair))

    def connect(self, prefill: Instance, decode: Instance) -> None:
        """Connect two instances that have no link yet, in the background; see ``linked``.

        Nothing is done while another decode is being linked to the prefill on demand, or where
        either of them has LINKS links already.
        """
        pair = prefill.name, decode.name
        links = map(len, map(self._links.others, pair))
        if prefill.name in self._on_demand or pair in self._linking or max(links) >= LINKS:
            return
        self._on_demand.add(prefill.name)
        task = asyncio.create_task(self._try(prefill, decode, None))
        self._linking[pair] = task
        task.add_done_callback(partial(self._tried, pair))
        task.add_done_callback(lambda _: self._on_demand.discard(prefill.name))

    def decodes(self, prefill: str) -> list[Instance]:
        """Return the decodes that are linked to a prefill."""
        members = self._members
        return [members[name] for name in self._links.others(prefill) if name in members]

    def _tried(self, pair: tuple[str, str], _: asyncio.Task[None]) -> None:
        del self._linking[pair]

    async def _try(self, prefill: Instance, decode: Instance, endpoint: bytes | None) -> None:
        try:
            await self._connect(prefill, decode, endpoint or await _describe(prefill))
        except errors.PDServeError:
            pass  # an instance's refusal has been logged already
        except Exception as error:  # they are tried again in the next round
            _log.error(
                "%s and %s cannot be connected\n%s", prefill.name, decode.name, traced(error)
            )

    async def connect_now(self, prefill: Instance, decode: Instance) -> None:
        """Connect two instances for a waiting request, whose decode has said that it has no link.

        Raises:
            InstanceError: they cannot be connected, or one of them does not answer.
        """
        # An attempt in the background may never be answered, so the request makes its own.
        endpoint = await _describe(prefill)
        if self._owns_names(prefill, decode):
            self._links.pop((prefill.name, decode.name))
        await self._connect(prefill, decode, endpoint)

    async def _connect(self, prefill: Instance, decode: Instance, endpoint: bytes) -> None:
        pair = prefill.name, decode.name
        known, _ = self._links.known.get(pair) or (b"", None)
        if known == endpoint:
            return
        if self._owns_names(prefill, decode):
            self._links.pop(pair)
        connected = await decode.ask(Connect(decode.new_id(), endpoint), CONNECT_S)
        decode.heard(connected)
        ours = self._owns_names(prefill, decode)
        if not isinstance(connected, Connected):
            reason = getattr(connected, "message", f"{connected}")
            if ours:
                if self._refused.known.get(pair) != reason:
                    _log.warning("%s and %s cannot be connected: %s", *pair, reason)
                self._refused[pair] = reason
                self._reach_changed(prefill.name)
            raise errors.InstanceError(reason)
        if not ours:
            return
        self._links[pair] = endpoint, connected
        if self._refused.pop(pair):
            self._reach_changed(prefill.name)
        self.linked()

    def _owns_names(self, prefill: Instance, decode: Instance) -> bool:
        """Tell whether both still own their names, so that what is learned belongs to these two."""
        return all(self._members.get(one.name, one) is one for one in (prefill, decode))

    def _reach_changed(self, prefill: str) -> None:
        if prefill in self._planned:
            self._planned[prefill] = self._plan(prefill)
            (self._alone.add if self._is_alone(prefill) else self._alone.discard)(prefill)
            self._find_useless()

    def _is_alone(self, prefill: str) -> bool:
        refused = self._refused.others(prefill)
        return len(refused) >= len(self._decodes) and all(
            decode.name in refused for decode in self._decodes
        )

    def _find_useless(self) -> None:
        self.useless = frozenset(self._alone if len(self._alone) < len(self._prefills) else ())

    def forget(self, instance: Instance) -> None:
        """Forget the links of an instance that has failed, since it may have restarted."""
        if self._members.get(instance.name) is instance:
            self._links.drop(instance.name)

    def refusal(self, prefill: str, decode: str) -> str | None:
        """Return why the decode could not connect to the prefill last.

        None: it could, or never tried.
        """
        return self._refused.known.get((prefill, decode))

    def unreachable(self, prefill: str) -> dict[str, str]:
        """Return for each decode why it could not connect to the prefill.

        Empty: one could, or has not tried.
        """
        if not self._is_alone(prefill):
            return {}
        return {one.name: self.refusal(prefill, one.name) or "" for one in self._decodes}

    def transfer_s(self, prefill: str, decode: str, tokens: int) -> float:
        """Return the estimated seconds of a transfer of ``tokens`` tokens.

        0: the pair has no link yet.
        """
        if (link := self._links.known.get((prefill, decode))) is None:
            return 0.0
        _, connected = link
        return (
            connected.link.latency_s
            + tokens * connected.bytes_per_token / connected.link.bytes_per_s
        )

    def layered(self, prefill: str, tokens: int) -> bool:
        """Tell whether decodes should pull while this prefill computes ``tokens`` tokens.

        The slowest of its links decides, since it is not known yet which decode will be idle.
        """
        if self._layered is not None:
            return self._layered
        for decode in self._links.others(prefill):
            _, one = self._links.known[prefill, decode]
            if tokens * one.bytes_per_token > OVERLAP_S * one.link.bytes_per_s:
                return True
        return False


async def _describe(prefill: Instance) -> bytes:
    """Return a prefill's endpoint. Raises InstanceError if it does not answer, or not with one."""
    described = await prefill.ask(Describe(prefill.new_id()), DESCRIBE_S)
    if not isinstance(described, Described):
        raise errors.InstanceError(f"{prefill.name} answered {described} to describe")
    return described.endpoint
