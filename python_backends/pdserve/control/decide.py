"""All decisions of one tick.

In this order, so that what restores service comes before what improves it::

    transactions go on ► members are marked as lost, or serve again ► lost ones are replaced
    ► tide ► ratio

A group that a transaction changes is left alone by everything below the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from msgspec import Struct, structs

from pdserve.control import narrate
from pdserve.control.advance import Writes, advance
from pdserve.control.cluster import Cluster, Group
from pdserve.control.events import Event
from pdserve.control.memory import GroupMemory, Memory
from pdserve.control.moves import first
from pdserve.control.observe import observe
from pdserve.control.policy import Policy
from pdserve.control.rebalance import rebalance
from pdserve.control.records import (
    DESIRED_GROUPS,
    DESIRED_INSTANCES,
    TRANSACTIONS,
    DesiredGroup,
)
from pdserve.control.substitution import RETRY_S, losses, rescue, spare, substitute
from pdserve.control.tide import due, turn_of_tide
from pdserve.control.transaction import Kind, Step, Transaction
from pdserve.control.upkeep import marks
from pdserve.control.volume import IN_S, OUT_S, volume, wanted_out

TICK_S = 5.0
"""Time between two samples of the metrics. Decisions may be made more often: whatever has changed
in between, such as a step that is over, is then seen at once."""
MOST_WRITES = 120
"""Writes in one fenced write; a store takes 128, those of events included."""


@dataclass(frozen=True, slots=True)
class Write:
    """A record to put, or to delete, in the fenced write of one decision."""

    key: str
    record: Struct | None
    """None: the key is deleted."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """The result of one call of `decide`."""

    writes: tuple[Write, ...]
    """All in one fenced write, at most `MOST_WRITES`; no key twice."""
    events: tuple[Event, ...]
    """To be kept if the write succeeds."""
    memory: Memory
    """Given to the next call, also if the write failed: decisions are made again from what is
    stored."""


def decide(cluster: Cluster, policy: Policy, memory: Memory) -> Decisions:
    """Return what to write, what to tell, and what to remember.

    It is a pure function; called again with the same state it decides the same. It is
    level-triggered: nothing is written while what is stored is what should be. A new controller
    begins with ``Memory()``.
    """
    draft = _Draft(cluster, policy, observe(cluster, memory))
    draft.transactions()
    draft.marks()
    for group in cluster.groups.values():
        draft.losses(group)
    draft.tides()
    for group in cluster.groups.values():
        draft.ratio(group, memory.of(group.name))
    writes = tuple(Write(key, record) for key, record in draft.writes.items())
    return Decisions(writes, tuple(draft.events), draft.memory)


@dataclass(slots=True)
class _Draft:
    """The decisions so far; what it is given does not change."""

    cluster: Cluster
    policy: Policy
    memory: Memory
    writes: Writes = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    """Groups that a transaction begins to change."""
    marked: set[str] = field(default_factory=set)
    """Groups of which a member is taken out of service, or serves again."""
    taken: set[str] = field(default_factory=set)
    """Spares that it takes."""

    def transactions(self) -> None:
        """Let each transaction go on."""
        for name, transaction in sorted(self.cluster.transactions.items()):
            room = MOST_WRITES - len(self.writes) - 4
            found = advance(transaction, self.cluster, self.policy, room)
            if found.transaction == transaction and not found.transaction.over:
                continue
            self.writes.update(found.writes)
            over = found.transaction.over
            self.writes[TRANSACTIONS + name] = None if over else found.transaction
            self.events += narrate.steps(self.cluster.now, found)
            for _, after in found.stepped:
                if after.step is Step.RETURN or (
                    after.step is Step.RESUME and after.took["drain"] > self.policy.drain_s
                ):
                    self._put_off(after.instance)

    def marks(self) -> None:
        """Take lost members out of service, and bring back those that have returned."""
        for mark in marks(self.cluster, self.policy):
            key = DESIRED_INSTANCES + mark.member.name
            if len(self.writes) < MOST_WRITES and key not in self.writes:
                self.writes[key] = mark.desired
                self.marked.add(mark.member.group)
                self.events.append(narrate.marked(self.cluster.now, mark))

    def losses(self, group: Group) -> None:
        """Replace a lost member of a group."""
        lost = losses(self.cluster, group.name, self.policy)
        names = {member.name for member, _ in lost}
        short = {name for name in self.memory.short if name in self.cluster.members}
        short -= {one.name for one in self.cluster.of(group.name)} - names
        for member, why in lost[:1] if self._free(group.name) else ():
            unavailable = {*self.memory.not_before, *self.taken}
            found = spare(self.cluster, member, self.policy, unavailable)
            if found is not None:
                self.taken.add(found.name)
                self._begin(substitute(self.cluster, member, why, found))
                continue
            saved = rescue(self.cluster, group.name, member)
            if saved is not None and self.policy.ratio == "act":
                self._begin(saved)
            elif member.name not in short:
                short.add(member.name)
                self.events.append(narrate.short(self.cluster.now, member, why))
        self.memory = replace(self.memory, short=frozenset(short))

    def tides(self) -> None:
        """Bring a tide's instances where they should be, for groups that nothing changes."""
        for tide in self.policy.tides:
            group = self.cluster.groups.get(tide.group)
            if group is None:
                continue
            out, told = due(tide, self.cluster.now), None
            if tide.volume:
                out, told = self._by_volume(group)
            other = tide.to if tide.to in self.cluster.groups else tide.group
            if not (self._calm(tide.group) and self._calm(other)):
                continue
            found = turn_of_tide(self.cluster, tide, out, self.policy, self.memory.not_before)
            if found is not None:
                self.events += [told] if told else []
                self._begin(found)

    def ratio(self, group: Group, before: GroupMemory) -> None:
        """Change a group's ratio, or tell why not."""
        known = self.memory.of(group.name)
        if not self._calm(group.name):
            return
        new = known.window.last is not before.window.last
        not_now = self.memory.not_before
        verdict = rebalance(self.cluster, group, self.policy, known, new, not_now)
        known = verdict.memory
        told = verdict.hold
        if verdict.advice is not None and told == "advise":
            told += f" {verdict.advice.prefills}"
        if verdict.transaction is not None:
            known = replace(known, told="")
            self._begin(verdict.transaction, narrate.inputs(verdict))
        elif verdict.hold not in ("", "confirm") and told != known.told:
            known = replace(known, told=told)
            self.events.append(narrate.held(self.cluster.now, group.name, verdict))
        self._remember(group.name, known)

    def _by_volume(self, group: Group) -> tuple[bool, Event | None]:
        """Return whether equation (2) wants a group out, and what to tell; unknown: as it is."""
        is_out, known = group.share == 0, self.memory.of(group.name)
        found = volume(self.cluster, group, self.memory)
        if found is None or wanted_out(found, is_out) == is_out:
            self._remember(group.name, replace(known, spare_since=None))
            return is_out, None
        since = self.cluster.now if known.spare_since is None else known.spare_since
        self._remember(group.name, replace(known, spare_since=since))
        if self.cluster.now - since < (IN_S if is_out else OUT_S):
            return is_out, None
        return not is_out, narrate.needed(self.cluster.now, group, found, is_out)

    def _free(self, group: str) -> bool:
        """Tell whether nothing changes a group, and there is room for another transaction."""
        room = len(self.writes) <= MOST_WRITES - 8
        return room and group not in self.begun and self.cluster.busy(group) is None

    def _calm(self, group: str) -> bool:
        """Tell whether its members are also as they were."""
        return group not in self.marked and self._free(group)

    def _begin(self, transaction: Transaction, numbers: dict[str, float] | None = None) -> None:
        """Write a transaction, and the first desired state of each of its moves."""
        moves = transaction.moves
        if any(first(move) is not None for move in moves):
            moves = moves[: MOST_WRITES - len(self.writes) - 2]
        transaction = structs.replace(transaction, moves=moves)
        self.begun |= {transaction.group, transaction.other} - {""}
        self.writes[TRANSACTIONS + transaction.group] = transaction
        for move in moves:
            wanted = first(move)
            if wanted is not None:
                self.writes[DESIRED_INSTANCES + move.instance] = wanted
        if transaction.whole and transaction.kind is Kind.OUT:
            group = self.cluster.groups[transaction.group]
            self.writes[DESIRED_GROUPS + group.name] = DesiredGroup(group.scenario, 0.0)
        self.events.append(narrate.begun(self.cluster.now, transaction, numbers or {}))

    def _put_off(self, instance: str) -> None:
        until = {instance: self.cluster.now + RETRY_S}
        self.memory = replace(self.memory, not_before={**self.memory.not_before, **until})

    def _remember(self, group: str, known: GroupMemory) -> None:
        self.memory = replace(self.memory, groups={**self.memory.groups, group: known})
