"""Which decode reaches which prefill's memory, and how: told to each other before it is needed.

The pairs of a plan (``link_plan``) are introduced when they first can be, and again when either of
them has a new life; a decode connects, probes and warms its link then, and not with the first
request. Other pairs are introduced while a prompt is computed, if no linked decode is idle.
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
from pdserve.rpc.messages import Describe, Described, Join, Joined
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.link_plan import PEERS, Ring
from pdserve.scheduling.pairs import Pair, Pairs
from pdserve.supervision import repeat, traced

_log = logging.getLogger(__name__)

ROUND_S = 2.0
# While somebody has not met: servers that start together are not ready together.
HASTE_S = 0.25
AT_ONCE = 64
"""Prefills that are asked in one round whether they are what they were; others have their turn."""
DESCRIBE_S = 2.0
# A decode probes every transport in turn, some seconds each if a peer does not answer.
JOIN_S = 20.0
# A transfer that takes less is not worth choosing the decode before the prefill has begun: about
# what one token takes.
OVERLAP_S = 0.02
LINKS = 6 * PEERS
"""Links of an instance: with so many, none is made on demand any more."""


class KVLinks:
    """Has the prefills and decodes of a gateway's group connect.

    Several gateways may introduce the same pairs.

    Args:
        gateway, group: names of its model and of the group, for the metrics.
        layered: True, False, or None: where a transfer would be long.
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
        self._joined = Pairs[tuple[bytes, Joined]]()
        """With the description that led to it."""
        self._refused = Pairs[str]()
        self.useless: frozenset[str] = frozenset()
        """Prefills that no decode could meet, as long as there are others."""
        self._alone: set[str] = set()
        """The same, whether or not there are others."""
        self.linked: Callable[[], None] = lambda: None
        """Called when two have met."""
        self._joining: dict[Pair, asyncio.Task[None]] = {}
        self._on_demand: set[str] = set()
        """Prefills to which a decode is being linked on demand."""
        self._changed = asyncio.Event()
        self._next, self._turn_at = 0, 0.0
        """Of the prefills, whose turn it is to be asked, and when."""
        self._take(prefills, decodes)

    def _take(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        self._prefills, self._decodes = prefills, decodes
        self._members = {one.name: one for one in (*prefills, *decodes)}
        self._ring = Ring(one.name for one in decodes)
        ring = Ring(one.name for one in prefills)
        self._chosen = defaultdict[str, list[str]](list)
        """Decodes that have chosen a prefill."""
        for decode in decodes:
            for name in itertools.islice(ring.after(decode.name), PEERS):
                self._chosen[name].append(decode.name)
        self.dense = len(prefills) <= PEERS and len(decodes) <= PEERS
        """Every pair is planned to be linked."""
        self._planned = {one.name: self._plan(one.name) for one in prefills}
        self._alone = {one.name for one in prefills if self._is_alone(one.name)}
        self._find_useless()

    def _plan(self, prefill: str) -> dict[str, None]:
        """Decodes to be linked to a prefill: those that have chosen it, and PEERS that reach it."""
        planned = dict.fromkeys(self._chosen[prefill])
        reach = 0
        for name in self._ring.after(prefill):
            planned[name] = None
            reach += (prefill, name) not in self._refused.known
            if reach == PEERS:
                break
        return planned

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Go on with these instances: those who have joined are introduced at once.

        What is known of those who have left is kept until ``let_go``, since KV caches of theirs may
        still wait to be handed over; unless another instance has taken the name.
        """
        before = {*self._prefills, *self._decodes}
        names = {one.name for one in (*prefills, *decodes)}
        for gone in before.difference(prefills, decodes):
            for pair, task in self._joining.items():
                if gone.name in pair:
                    task.cancel()
            if gone.name in names:
                self._drop(gone.name)
        self._take(prefills, decodes)
        self._changed.set()

    def let_go(self, instance: Instance) -> None:
        """An instance has left and serves nobody any more: forget it, unless its name is taken."""
        if instance.name not in self._members:
            self._drop(instance.name)

    def _drop(self, name: str) -> None:
        self._joined.drop(name)
        self._refused.drop(name)

    async def run(self) -> None:
        """Introduce whom nobody has yet, until cancelled."""
        try:
            await repeat("introducing prefills and decodes", self._introductions, self._changed)
        finally:
            for task in list(self._joining.values()):
                task.cancel()
            self._tell(connected=0, refused=0, unknown=0)

    async def _introductions(self) -> float:
        """One round; the seconds until the next."""
        await asyncio.gather(*map(self._round, self._due()))
        met = sum(pair in self._joined.known for pair in self._pairs())
        refused = sum(pair in self._refused.known for pair in self._pairs())
        unknown = sum(map(len, self._planned.values())) - met - refused
        self._tell(connected=met, refused=refused, unknown=unknown)
        return HASTE_S if unknown else ROUND_S

    @property
    def missing(self) -> int:
        """Planned links that have neither been made nor refused."""
        return sum(not self._settled(pair) for pair in self._pairs())

    def __len__(self) -> int:
        """Links that have been made."""
        return len(self._joined)

    def _pairs(self) -> Iterator[Pair]:
        return ((one, other) for one, others in self._planned.items() for other in others)

    def _due(self) -> Sequence[Instance]:
        """Prefills to be asked in this round: those that lack a link, and some others in turn."""
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
        return pair in self._joined.known or pair in self._refused.known

    def _tell(self, **pairs: int) -> None:
        for state, count in pairs.items():
            self._metrics.set(catalogue.KV_LINKS, count, **self._labels, state=state)

    async def _round(self, prefill: Instance) -> None:
        try:
            description = await _describe(prefill)
        except errors.PDServeError:
            return  # not there, or not yet
        if self._members.get(prefill.name) is not prefill:  # it has left meanwhile
            return
        for name in self._planned[prefill.name]:
            self._start(prefill, self._members[name], description)
        for name in self._joined.others(prefill.name):  # those on demand
            if (decode := self._members.get(name)) is not None:
                self._start(prefill, decode, description)

    def _start(self, prefill: Instance, decode: Instance, description: bytes) -> None:
        pair = prefill.name, decode.name
        known, _ = self._joined.known.get(pair) or (b"", None)
        # One that takes its time holds up nobody else.
        if pair not in self._joining and known != description:
            task = asyncio.create_task(self._try(prefill, decode, description))
            self._joining[pair] = task
            task.add_done_callback(partial(self._tried, pair))

    def connect(self, prefill: Instance, decode: Instance) -> None:
        """Introduce two that nobody has introduced yet, soon; see ``linked``.

        Not while another decode is being linked to the prefill on demand, nor where either of them
        has LINKS links already.
        """
        pair = prefill.name, decode.name
        links = map(len, map(self._joined.others, pair))
        if prefill.name in self._on_demand or pair in self._joining or max(links) >= LINKS:
            return
        self._on_demand.add(prefill.name)
        task = asyncio.create_task(self._try(prefill, decode, None))
        self._joining[pair] = task
        task.add_done_callback(partial(self._tried, pair))
        task.add_done_callback(lambda _: self._on_demand.discard(prefill.name))

    def decodes(self, prefill: str) -> list[Instance]:
        """The decodes that are linked to a prefill."""
        members = self._members
        return [members[name] for name in self._joined.others(prefill) if name in members]

    def _tried(self, pair: tuple[str, str], _: asyncio.Task[None]) -> None:
        del self._joining[pair]

    async def _try(self, prefill: Instance, decode: Instance, description: bytes | None) -> None:
        try:
            await self._join(prefill, decode, description or await _describe(prefill))
        except errors.PDServeError:
            pass  # told in the log where it is an answer
        except Exception as error:  # they are introduced again in the next round
            _log.error("%s and %s cannot meet\n%s", prefill.name, decode.name, traced(error))

    async def introduce(self, prefill: Instance, decode: Instance) -> None:
        """A decode has said that it does not know the prefill: it has a new life.

        Raises:
            InstanceError: they cannot meet, or one of them does not answer.
        """
        pair = prefill.name, decode.name
        if (joining := self._joining.get(pair)) is not None:
            await asyncio.wait({joining})
            if pair in self._joined.known:
                return
        description = await _describe(prefill)
        if self._owns_names(prefill, decode):
            self._joined.pop(pair)
        await self._join(prefill, decode, description)

    async def _join(self, prefill: Instance, decode: Instance, description: bytes) -> None:
        pair = prefill.name, decode.name
        known, _ = self._joined.known.get(pair) or (b"", None)
        if known == description:
            return
        if self._owns_names(prefill, decode):
            self._joined.pop(pair)
        joined = await decode.ask(Join(decode.new_id(), description), JOIN_S)
        decode.heard(joined)
        ours = self._owns_names(prefill, decode)
        if not isinstance(joined, Joined):
            reason = getattr(joined, "message", f"{joined}")
            if ours:
                if self._refused.known.get(pair) != reason:
                    _log.warning("%s and %s cannot meet: %s", *pair, reason)
                self._refused[pair] = reason
                self._reach_changed(prefill.name)
            raise errors.InstanceError(reason)
        if not ours:
            return
        self._joined[pair] = description, joined
        if self._refused.pop(pair):
            self._reach_changed(prefill.name)
        self.linked()

    def _owns_names(self, prefill: Instance, decode: Instance) -> bool:
        """Whether no successor has the name of either, so that what is learned is of these two."""
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
        """It has failed: what is known of it may be of a former life."""
        if self._members.get(instance.name) is instance:
            self._joined.drop(instance.name)

    def refusal(self, prefill: str, decode: str) -> str | None:
        """Why the decode could not meet the prefill last; None: it could, or has not tried."""
        return self._refused.known.get((prefill, decode))

    def unreachable(self, prefill: str) -> dict[str, str]:
        """Why no decode could meet the prefill, by decode; empty: one could, or has not tried."""
        if not self._is_alone(prefill):
            return {}
        return {one.name: self.refusal(prefill, one.name) or "" for one in self._decodes}

    def transfer_s(self, prefill: str, decode: str, tokens: int) -> float:
        """What the KV cache of so many tokens would take; 0: they have not met yet."""
        if (link := self._joined.known.get((prefill, decode))) is None:
            return 0.0
        _, joined = link
        return joined.met.latency_s + tokens * joined.bytes_per_token / joined.met.bytes_per_s

    def layered(self, prefill: str, tokens: int) -> bool:
        """Whether a decode should follow this prefill's computation of so many tokens.

        The slowest of its links decides: which decode will be idle is not known yet.
        """
        if self._layered is not None:
            return self._layered
        for decode in self._joined.others(prefill):
            _, one = self._joined.known[prefill, decode]
            if tokens * one.bytes_per_token > OVERLAP_S * one.met.bytes_per_s:
                return True
        return False


async def _describe(prefill: Instance) -> bytes:
    """Raises: InstanceError: it does not answer, or with something else."""
    described = await prefill.ask(Describe(prefill.new_id()), DESCRIBE_S)
    if not isinstance(described, Described):
        raise errors.InstanceError(f"{prefill.name} answered {described} to describe")
    return described.description
