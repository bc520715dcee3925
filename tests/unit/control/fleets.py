"""A small fleet as a controller sees it; each instance does what a test says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from msgspec.structs import replace

from pdserve.control.assignment import Assignment
from pdserve.control.cluster import Cluster, Counters, Group, Line, Load, Member
from pdserve.control.decide import TICK_S, Decisions, decide
from pdserve.control.memory import Memory
from pdserve.control.policy import Policy
from pdserve.control.records import (
    DESIRED_GROUPS,
    DESIRED_INSTANCES,
    LENT,
    PINS,
    TRANSACTIONS,
    DesiredGroup,
    DesiredInstance,
    ObservedInstance,
    Phase,
    decode,
    encode,
)
from pdserve.control.transaction import Step, Transaction
from pdserve.control.work import Work

if TYPE_CHECKING:
    from msgspec import Struct

    from pdserve.control.events import Event

GROUP = "chat"
SLOTS = 16
NOON = 43_200.0 + 20_000 * 86_400


class Fleet:
    """A store, instances with their agents, and a controller.

    Args:
        prefills, decodes: members of the group, all of them flexible.
        spares: loaded, idle instances. absent: instances that are not loaded.
    """

    def __init__(
        self, prefills: int, decodes: int, spares: int = 0, absent: int = 0, **policy: Any
    ) -> None:
        self.now = NOON
        self.policy = Policy(**policy)
        self.memory = Memory()
        self.store: dict[str, Struct] = {DESIRED_GROUPS + GROUP: DesiredGroup("chat")}
        self.seen: dict[str, ObservedInstance] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        """By instance: other fields of its ``Member``."""
        self.group: dict[str, Any] = {}
        """Other fields of the group."""
        self.events: list[Event] = []
        self.counters: dict[str, Counters | None] = {}
        self.line = Line(0.0, 0.0, 0.0, 0.0)
        for kind, count in (("p", prefills), ("d", decodes), ("s", spares), ("a", absent)):
            for n in range(count):
                self.add(f"{kind}{n}", kind)

    def add(self, name: str, kind: str, group: str = GROUP) -> None:
        role: Any = {"p": "prefill", "d": "decode"}.get(kind, "none")
        given = Assignment(1, role, group if kind in "pd" else "")
        state: Literal["serving", "absent"] = "absent" if kind == "a" else "serving"
        self.store[DESIRED_INSTANCES + name] = DesiredInstance(given, state)
        self.seen[name] = ObservedInstance(f"host_{name}", "server", "", "flexible", "ready")
        self.obey(name)

    def obey(self, *names: str) -> None:
        """Let instances become what is desired of them."""
        for name in names or self.seen:
            wanted = self.desired(name)
            phase = Phase.SERVING if wanted.assignment.role != "none" else Phase.UNASSIGNED
            if wanted.state == "draining":
                phase = Phase.DRAINED
            self.observe(
                name,
                state="absent" if wanted.state == "absent" else "ready",
                assignment=None if wanted.state == "absent" else wanted.assignment,
                phase=phase,
            )

    def observe(self, name: str, **changes: Any) -> None:
        self.seen[name] = replace(self.seen[name], **changes)

    def desired(self, name: str) -> DesiredInstance:
        record = self.store[DESIRED_INSTANCES + name]
        assert isinstance(record, DesiredInstance)
        return record

    def transaction(self, group: str = GROUP) -> Transaction:
        record = self.store[TRANSACTIONS + group]
        assert isinstance(record, Transaction)
        return record

    @property
    def busy(self) -> bool:
        return TRANSACTIONS + GROUP in self.store

    def steps(self) -> dict[str, Step]:
        return {move.instance: move.step for move in self.transaction().moves}

    def roles(self, group: str = GROUP) -> tuple[int, int]:
        """Return the desired numbers of prefills and decodes."""
        given = [
            record.assignment
            for record in self.store.values()
            if isinstance(record, DesiredInstance) and record.assignment.group == group
        ]
        prefills = sum(one.role == "prefill" for one in given)
        return prefills, len(given) - prefills

    def cluster(self) -> Cluster:
        store = self.store
        members = {
            name: Member(
                name,
                self.desired(name),
                seen,
                lent=store.get(LENT + name),  # type: ignore[arg-type]
                **self.facts.get(name, {}),
            )
            for name, seen in self.seen.items()
        }
        groups = {
            key.removeprefix(DESIRED_GROUPS): record
            for key, record in store.items()
            if isinstance(record, DesiredGroup)
        }
        load = Load(self.now, dict(self.counters), {"gateway": self.line})
        return Cluster(
            self.now,
            members,
            {
                name: Group(
                    name,
                    record.scenario,
                    record.share,
                    **{
                        "limit_s": 10.0,
                        "decode_slots": SLOTS,
                        "load": load,
                        "pin": store.get(PINS + name),
                    }
                    | self.group,
                )
                for name, record in groups.items()
            },
            {
                key.removeprefix(TRANSACTIONS): record
                for key, record in store.items()
                if isinstance(record, Transaction)
            },
        )

    def decide(self, seconds: float = 0.0) -> Decisions:
        """Let some time pass, decide, and write."""
        self.now += seconds
        found = decide(self.cluster(), self.policy, self.memory)
        self.memory = found.memory
        self.events += found.events
        assert len({write.key for write in found.writes}) == len(found.writes)
        for write in found.writes:
            if write.record is None:
                self.store.pop(write.key, None)
            else:
                self.store[write.key] = decode(encode(write.record), type(write.record))
        return found

    def work(self, prefill_rate: float, decode_rate: float, seconds: float = TICK_S) -> None:
        """Let each member work for some time, at 80 % of what it can do."""
        for name in self.seen:
            given = self.desired(name).assignment
            if given.group != GROUP:
                continue
            rate = 0.8 * (prefill_rate if given.role == "prefill" else decode_rate)
            slot_s = 0.8 * SLOTS if given.role == "decode" else 1.0
            before = self.counters.get(name)
            old = before.work if before and before.number == given.number else Work()
            done = Work(rate * seconds, 0.8 * seconds, slot_s * seconds)
            self.counters[name] = Counters(given.number, old + done)

    def live(self, seconds: float, prefill_rate: float, decode_rate: float) -> list[str]:
        """Let ticks pass in which every instance does what is desired; return what was told."""
        first = len(self.events)
        until = self.now + seconds
        while self.now < until:
            self.work(prefill_rate, decode_rate)
            self.decide(TICK_S)
            self.obey()
        return [event.what for event in self.events[first:]]
