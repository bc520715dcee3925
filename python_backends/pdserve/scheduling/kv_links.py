"""Links from decodes to the memory of prefills, made before a request needs them.

The pairs of a plan (``link_plan``) are connected as soon as they can be, and again when either of
them has restarted; a decode opens, probes and warms its link then, and not with the first request.
An instance that joins a group is offered requests once that is done. Other pairs are connected
while a prompt is computed, if no linked decode is idle.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Connect, Connected, Describe, Described
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.link_plan import PEERS
from pdserve.scheduling.link_table import LinkTable
from pdserve.scheduling.pairs import Pair
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
JOIN_S = 2.0
"""Maximum seconds for which an instance that has joined waits for its links before it is used."""
# A shorter transfer is not worth choosing the decode before the prefill has begun: about the time
# that one token takes.
OVERLAP_S = 0.02
LINKS = 6 * PEERS
"""Links of one instance above which none is made on demand any more."""

Why = Literal["planned", "on_demand", "request"]
"""Reason for which a link is made: the plan; a prompt that is being computed, for which no linked
decode is idle; or a request that waits for it."""


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
        self.changed: Callable[[], None] = lambda: None
        """Called when an instance or a pair may be used that could not be used before."""
        self._linking: dict[Pair, asyncio.Task[None]] = {}
        self._on_demand: set[str] = set()
        """Prefills to which a decode is being linked on demand."""
        self._again = asyncio.Event()
        """Set when the next round shall begin at once."""
        self._next, self._turn_at = 0, 0.0
        """Index of the prefill that is asked next, and the time of the next turn."""
        self._take(prefills, decodes)
        self.table = LinkTable(_names(prefills), _names(decodes))

    def _take(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        self._prefills, self._decodes = prefills, decodes
        self._members = {one.name: one for one in (*prefills, *decodes)}

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Replace the instances; those that have joined are connected at once.

        What is known of those that have left is kept until ``let_go``, since KV caches of theirs
        may still wait to be handed over, unless another instance has taken the name.
        """
        before, after = (*self._prefills, *self._decodes), {*prefills, *decodes}
        self._take(prefills, decodes)
        for gone in [one for one in before if one not in after]:
            for pair, task in self._linking.items():
                if gone.name in pair:
                    task.cancel()
            if gone.name in self._members:
                self.table.drop(gone.name)
        new = after.difference(before)
        self.table.update(_names(prefills), _names(decodes), [one.name for one in new])
        if new:
            asyncio.get_running_loop().call_later(JOIN_S, self._joined, new)
        self._again.set()

    def _joined(self, new: set[Instance]) -> None:
        for one in new:
            if self._members.get(one.name) is one:
                self.table.joined(one.name)
        self.changed()

    def let_go(self, instance: Instance) -> None:
        """Forget an instance that has left and serves no request, unless its name is taken."""
        if instance.name not in self._members:
            self.table.drop(instance.name)

    async def run(self) -> None:
        """Connect the planned pairs that have no link, until cancelled."""
        try:
            await repeat("connecting prefills and decodes", self._connect_all, self._again)
        finally:
            for task in list(self._linking.values()):
                task.cancel()
            self._tell(connected=0, refused=0, unknown=0)

    async def _connect_all(self) -> float:
        """Run one round; return the seconds until the next."""
        await asyncio.gather(*map(self._round, self._due()))
        counts = self.table.counts()
        self._tell(**counts)
        return HASTE_S if counts["unknown"] else ROUND_S

    def _due(self) -> Sequence[Instance]:
        """Return the prefills to ask in this round: those without a link, and others in turn."""
        if len(self._prefills) <= AT_ONCE:
            return self._prefills
        due = {pair[0] for pair in self.table.pairs() if not self.table.settled(pair)}
        now = asyncio.get_running_loop().time()
        if now >= self._turn_at:
            self._turn_at = now + ROUND_S
            begin, self._next = self._next, (self._next + AT_ONCE) % len(self._prefills)
            turn = itertools.islice(itertools.cycle(self._prefills), begin, begin + AT_ONCE)
            due.update(one.name for one in turn)
        return [one for one in self._prefills if one.name in due]

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
        # Links that were made on demand are kept, too.
        planned, made = self.table.planned(prefill.name), self.table.others(prefill.name)
        for name in dict.fromkeys((*planned, *made)):
            decode = self._members.get(name)
            # A pair that takes long delays no other.
            if decode is not None and self.table.endpoint((prefill.name, name)) != endpoint:
                self._start(prefill, decode, endpoint, "planned")

    def connect(self, prefill: Instance, decode: Instance) -> None:
        """Connect two instances that have no link yet, in the background; see ``changed``.

        Nothing is done while another decode is being linked to the prefill on demand, or where
        either of them has LINKS links already.
        """
        links = max(len(self.table.others(one.name)) for one in (prefill, decode))
        if prefill.name in self._on_demand or links >= LINKS:
            return
        if (task := self._start(prefill, decode, None, "on_demand")) is not None:
            self._on_demand.add(prefill.name)
            task.add_done_callback(lambda _: self._on_demand.discard(prefill.name))

    def _start(
        self, prefill: Instance, decode: Instance, endpoint: bytes | None, why: Why
    ) -> asyncio.Task[None] | None:
        pair = prefill.name, decode.name
        if pair in self._linking:
            return None
        self._linking[pair] = task = asyncio.create_task(self._try(prefill, decode, endpoint, why))
        task.add_done_callback(lambda _: self._linking.pop(pair))
        return task

    async def _try(
        self, prefill: Instance, decode: Instance, endpoint: bytes | None, why: Why
    ) -> None:
        try:
            await self._connect(prefill, decode, endpoint or await _describe(prefill), why)
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
            self.table.lost((prefill.name, decode.name))
        await self._connect(prefill, decode, endpoint, "request")

    async def _connect(
        self, prefill: Instance, decode: Instance, endpoint: bytes, why: Why
    ) -> None:
        pair = prefill.name, decode.name
        if self.table.endpoint(pair) == endpoint:
            return
        if self._owns_names(prefill, decode):
            self.table.lost(pair)
        loop = asyncio.get_running_loop()
        began = loop.time()
        connected = await decode.ask(Connect(decode.new_id(), endpoint), CONNECT_S)
        ours = self._owns_names(prefill, decode)
        if not isinstance(connected, Connected):
            reason = getattr(connected, "message", f"{connected}")
            if ours and self.table.refuse(pair, reason):
                _log.warning("%s and %s cannot be connected: %s", *pair, reason)
            raise errors.InstanceError(reason)
        transport = connected.link.transport
        self._metrics.observe(
            catalogue.KV_LINK_SECONDS, loop.time() - began, transport=transport, reason=why
        )
        if ours:
            self.table.made(pair, endpoint, connected)
            self.changed()

    def _owns_names(self, prefill: Instance, decode: Instance) -> bool:
        """Tell whether both still own their names, so that what is learned belongs to these two."""
        return all(self._members.get(one.name, one) is one for one in (prefill, decode))

    def forget(self, instance: Instance) -> None:
        """Forget the links of an instance that has failed, since it may have restarted."""
        if self._members.get(instance.name) is instance:
            self.table.lost_all(instance.name)

    def decodes(self, prefill: str) -> list[Instance]:
        """Return the decodes that are linked to a prefill."""
        members = self._members
        return [members[name] for name in self.table.others(prefill) if name in members]

    def layered(self, prefill: str, tokens: int) -> bool:
        """Tell whether decodes should pull while this prefill computes ``tokens`` tokens.

        The slowest of its links decides, since it is not known yet which decode will be idle.
        """
        if self._layered is not None:
            return self._layered
        return any(
            self.table.transfer_s(prefill, decode, tokens) > OVERLAP_S
            for decode in self.table.others(prefill)
        )


def _names(instances: Sequence[Instance]) -> list[str]:
    return [one.name for one in instances]


async def _describe(prefill: Instance) -> bytes:
    """Return a prefill's endpoint. Raises InstanceError if it does not answer, or not with one."""
    described = await prefill.ask(Describe(prefill.new_id()), DESCRIBE_S)
    if not isinstance(described, Described):
        raise errors.InstanceError(f"{prefill.name} answered {described} to describe")
    return described.endpoint
