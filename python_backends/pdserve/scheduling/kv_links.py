"""Which decode reaches which prefill's memory, and how: told to each other before it is needed.

Every pair is introduced when it first can be, and again when either side has a new life; a decode
connects, probes and warms its link then, and not with the first request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.rpc.messages import Describe, Described, Join, Joined
from pdserve.scheduling.instance import Instance
from pdserve.supervision import repeat, traced

_log = logging.getLogger(__name__)

ROUND_S = 2.0
# While somebody has not met: servers that start together are not ready together.
HASTE_S = 0.25
DESCRIBE_S = 2.0
# A decode probes every transport in turn, some seconds each if a peer does not answer.
JOIN_S = 20.0
# A transfer that takes less is not worth choosing the decode before the prefill has begun: about
# what one token takes.
OVERLAP_S = 0.02


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
        self._prefills = prefills
        self._decodes = decodes
        self._layered = layered
        self._labels = {"gateway": gateway, "group": group}
        self._metrics = metrics
        self._joined: dict[tuple[str, str], tuple[bytes, Joined]] = {}
        """By prefill and decode: the description that led to it."""
        self._refused: dict[tuple[str, str], str] = {}
        self.useless: frozenset[str] = frozenset()
        """Prefills that no decode could meet, as long as there are others."""
        self._joining: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Go on with these instances: those who have joined are introduced at once.

        What is known of those who have left is kept until ``let_go``, since KV caches of theirs may
        still wait to be handed over; unless another instance has taken the name.
        """
        before = {*self._prefills, *self._decodes}
        self._prefills, self._decodes = prefills, decodes
        names = {one.name for one in self._members}
        for gone in before.difference(prefills, decodes):
            for pair, task in self._joining.items():
                if gone.name in pair:
                    task.cancel()
            if gone.name in names:
                self._drop(gone.name)
        self._find_useless()
        self._changed.set()

    def let_go(self, instance: Instance) -> None:
        """An instance has left and serves nobody any more: forget it, unless its name is taken."""
        if all(one.name != instance.name for one in self._members):
            self._drop(instance.name)

    @property
    def _members(self) -> tuple[Instance, ...]:
        return *self._prefills, *self._decodes

    def _drop(self, name: str) -> None:
        for pairs in (self._joined, self._refused):
            for pair in [pair for pair in pairs if name in pair]:
                del pairs[pair]

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
        await asyncio.gather(*map(self._round, self._prefills))
        pairs = [(one.name, two.name) for one in self._prefills for two in self._decodes]
        met = sum(pair in self._joined for pair in pairs)
        refused = sum(pair in self._refused for pair in pairs)
        self._tell(connected=met, refused=refused, unknown=len(pairs) - met - refused)
        return HASTE_S if len(pairs) > met + refused else ROUND_S

    def _tell(self, **pairs: int) -> None:
        for state, count in pairs.items():
            self._metrics.set(catalogue.KV_LINKS, count, **self._labels, state=state)

    async def _round(self, prefill: Instance) -> None:
        try:
            description = await _describe(prefill)
        except errors.PDServeError:
            return  # not there, or not yet
        if prefill not in self._prefills:  # it has left meanwhile
            return
        for decode in self._decodes:
            pair = prefill.name, decode.name
            known, _ = self._joined.get(pair, (b"", None))
            # One that takes its time holds up nobody else.
            if pair not in self._joining and known != description:
                task = asyncio.create_task(self._try(prefill, decode, description))
                self._joining[pair] = task
                task.add_done_callback(partial(self._tried, pair))

    def _tried(self, pair: tuple[str, str], _: asyncio.Task[None]) -> None:
        del self._joining[pair]

    async def _try(self, prefill: Instance, decode: Instance, description: bytes) -> None:
        try:
            await self._join(prefill, decode, description)
        except errors.PDServeError:
            pass  # told in the log where it is an answer
        except Exception as error:  # they are introduced again in the next round
            _log.error("%s and %s cannot meet\n%s", prefill.name, decode.name, traced(error))

    async def introduce(self, prefill: Instance, decode: Instance) -> None:
        """A decode has said that it does not know the prefill: it has a new life.

        Raises:
            InstanceError: they cannot meet, or one of them does not answer.
        """
        description = await _describe(prefill)
        if self._owns_names(prefill, decode):
            self._joined.pop((prefill.name, decode.name), None)
        await self._join(prefill, decode, description)

    async def _join(self, prefill: Instance, decode: Instance, description: bytes) -> None:
        pair = prefill.name, decode.name
        if pair in self._joined and self._joined[pair][0] == description:
            return
        if self._owns_names(prefill, decode):
            self._joined.pop(pair, None)
        joined = await decode.ask(Join(decode.new_id(), description), JOIN_S)
        decode.heard(joined)
        known = self._owns_names(prefill, decode)
        if not isinstance(joined, Joined):
            reason = getattr(joined, "message", f"{joined}")
            if known:
                if self._refused.get(pair) != reason:
                    _log.warning("%s and %s cannot meet: %s", *pair, reason)
                self._refused[pair] = reason
                self._find_useless()
            raise errors.InstanceError(reason)
        if not known:
            return
        if self._refused.pop(pair, None):
            self._find_useless()
        self._joined[pair] = description, joined

    def _owns_names(self, prefill: Instance, decode: Instance) -> bool:
        """Whether no successor has the name of either, so that what is learned is of these two."""
        return all(
            one is other or one.name != other.name
            for other in self._members
            for one in (prefill, decode)
        )

    def _find_useless(self) -> None:
        alone = {
            prefill.name
            for prefill in self._prefills
            if all((prefill.name, decode.name) in self._refused for decode in self._decodes)
        }
        self.useless = frozenset(alone if len(alone) < len(self._prefills) else ())

    def forget(self, instance: Instance) -> None:
        """It has failed: what is known of it may be of a former life."""
        if instance not in self._members:
            return
        for pair in [pair for pair in self._joined if instance.name in pair]:
            del self._joined[pair]

    def refusal(self, prefill: str, decode: str) -> str | None:
        """Why the decode could not meet the prefill last; None: it could, or has not tried."""
        return self._refused.get((prefill, decode))

    def transfer_s(self, prefill: str, decode: str, tokens: int) -> float:
        """What the KV cache of so many tokens would take; 0: they have not met yet."""
        joined = self._link(prefill, decode)
        if joined is None:
            return 0.0
        return joined.met.latency_s + tokens * joined.bytes_per_token / joined.met.bytes_per_s

    def layered(self, prefill: str, tokens: int) -> bool:
        """Whether a decode should follow this prefill's computation of so many tokens.

        The slowest of its links decides: which decode will be idle is not known yet.
        """
        if self._layered is not None:
            return self._layered
        return any(
            tokens * one.bytes_per_token > OVERLAP_S * one.met.bytes_per_s
            for one in (self._link(prefill, decode.name) for decode in self._decodes)
            if one is not None
        )

    def _link(self, prefill: str, decode: str) -> Joined | None:
        _, joined = self._joined.get((prefill, decode), (b"", None))
        return joined


async def _describe(prefill: Instance) -> bytes:
    """Raises: InstanceError: it does not answer, or with something else."""
    described = await prefill.ask(Describe(prefill.new_id()), DESCRIBE_S)
    if not isinstance(described, Described):
        raise errors.InstanceError(f"{prefill.name} answered {described} to describe")
    return described.description
