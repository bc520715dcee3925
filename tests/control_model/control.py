"""The controller's loop in the queue model: it looks, decides, and writes in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct

from pdserve.control.cluster import Cluster, Counters, Group, Line, Load, Member
from pdserve.control.decide import TICK_S, decide
from pdserve.control.events import Event
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
    decode,
    encode,
)
from pdserve.control.transaction import Transaction
from tests.control_model.agents import Agents
from tests.control_model.requests import DECODE_SLOTS
from tests.control_model.world import World

NOTICE_S = 0.2
"""Time after which the controller sees what an agent has reported."""
EPOCH = 1_800_000_000.0
"""Time of day at which a run begins, in seconds since 1970: a Friday, 8:00 UTC."""

Lie = Callable[[Load], Load | None]


@dataclass
class Controller:
    """A controller, and the store that it writes to."""

    world: World
    agents: Agents
    policy: Policy
    limit_s: float
    store: dict[str, Struct] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    events: list[Event] = field(default_factory=list)
    down_until: float = 0.0
    """No controller runs before this time, or none can write."""
    lie: Lie = lambda load: load
    """The change that a sample suffers on its way."""
    on_write: Callable[[dict[str, Struct | None]], bool] = lambda writes: True
    """Called before each write; False: it does not succeed."""
    soon: bool = False
    sample: dict[str, Load | None] = field(default_factory=dict)

    def begin(self) -> None:
        self.world.on_change = self.notice
        self.tick()

    def tick(self) -> None:
        """Look at the metrics, and decide."""
        now = self.world.now
        for name in self.world.lines:
            self.world.expire(self.world.lines[name])
            self.sample[name] = self.lie(self._sample(name))
        self.decide()
        self.world.at(now + TICK_S, self.tick)

    def notice(self) -> None:
        """Decide soon: an agent has reported something."""
        if not self.soon:
            self.soon = True
            self.world.at(self.world.now + NOTICE_S, self.decide)

    def kill(self, seconds: float) -> None:
        """End the controller, and let another one begin after some time."""
        self.down_until = self.world.now + seconds
        self.memory = Memory()

    def decide(self) -> None:
        self.soon = False
        if self.world.now < self.down_until:
            return
        found = decide(self.cluster(), self.policy, self.memory)
        self.memory = found.memory
        writes = {write.key: write.record for write in found.writes}
        assert len(writes) == len(found.writes) <= 120
        if writes and not self.on_write(writes):
            return
        self.events += found.events
        for key, record in writes.items():
            self._write(key, record)

    def _write(self, key: str, record: Struct | None) -> None:
        if record is None:
            self.store.pop(key, None)
        else:
            self.store[key] = decode(encode(record), type(record))
        if key.startswith(DESIRED_INSTANCES):
            name = key.removeprefix(DESIRED_INSTANCES)
            assert isinstance(record, DesiredInstance)
            self.agents.desired[name] = record
            # Gateways watch desired state.
            self.world.serves[name] = record.state == "serving"
            self.world.changed()
            self.agents.look(name)

    def cluster(self) -> Cluster:
        world, store = self.world, self.store
        members = {}
        for name, one in world.instances.items():
            desired = store.get(DESIRED_INSTANCES + name)
            members[name] = Member(
                name=name,
                desired=desired if isinstance(desired, DesiredInstance) else None,
                observed=self.agents.observed(one),
                agent=one.host not in self.agents.gone,
                failed_since=None if one.failed_since is None else EPOCH + one.failed_since,
                silent_since=None if one.silent_since is None else EPOCH + one.silent_since,
                lent=store.get(LENT + name),  # type: ignore[arg-type]
                drain=f"drains/{name}" in store,
            )
        groups = {}
        for name in world.lines:
            record = store[DESIRED_GROUPS + name]
            assert isinstance(record, DesiredGroup)
            groups[name] = Group(
                name=name,
                scenario=record.scenario,
                share=record.share,
                limit_s=self.limit_s,
                decode_slots=DECODE_SLOTS,
                load=self.sample.get(name),
                pin=store.get(PINS + name),  # type: ignore[arg-type]
            )
        transactions = {
            key.removeprefix(TRANSACTIONS): record
            for key, record in store.items()
            if isinstance(record, Transaction)
        }
        return Cluster(EPOCH + world.now, members, groups, transactions)

    def _sample(self, group: str) -> Load:
        world, line = self.world, self.world.lines[group]
        instances: dict[str, Counters | None] = {}
        for name, one in world.instances.items():
            if one.assignment is None or one.assignment.group != group:
                continue
            one.advance(world.now)
            up = one.process == "ready"
            counters = Counters(one.assignment.number, one.work(), float(len(one.leased)))
            instances[name] = counters if up else None
        oldest_s = world.now - line.waiting[0].arrived if line.waiting else 0.0
        seen = Line(float(len(line.waiting)), 0.0, oldest_s, float(line.routed))
        return Load(EPOCH + world.now, instances, {"gateway": seen})
