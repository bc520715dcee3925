"""The groups of a deployment, each with its own scheduler, kept from one deployment to the next."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

from pdserve import config, errors
from pdserve.control.assignment import ANY, FIRST
from pdserve.observability.metrics import Registry
from pdserve.rpc.client import Channel
from pdserve.rpc.messages import Inspect, Inspected, Reassigned
from pdserve.scheduling import ramp
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.supervision import Background

INSPECT_S = 1.0
"""Seconds within which an instance says what it is."""

OpenChannel = Callable[[str, config.Server, int], Channel]
"""Opens a channel to an instance of a server, under the number of its assignment, or ANY."""
Told = Callable[[str, Reassigned | Inspected], None]
"""Called with the name of an instance that has another assignment, or serves no more."""
_Key = tuple[config.Role, str, str, int, int]
"""Key of an instance: role, name, host and gRPC port of its server, and the number of its
assignment. So all that is learned of an instance is of one assignment."""

_NO_NUMBERS: Mapping[str, int] = MappingProxyType({})


class Group:
    """Prefills and decodes, and their scheduler."""

    def __init__(
        self, name: str, instances: dict[_Key, Instance], scheduler: Scheduler, kv_links: KVLinks
    ) -> None:
        self.name = name
        self.instances = instances
        self._begun = itertools.count()
        self._open: dict[int, None] = {}
        """Numbers of the requests that it serves, the oldest first."""
        self._left: dict[Instance, int] = {}
        """Instances that have left and are not forgotten yet, each with the number of the first
        request that began afterwards."""
        self._scheduler = scheduler
        self._linking = Background()
        self._linking.start(kv_links.run())

    @property
    def healthy(self) -> bool:
        return self._scheduler.healthy

    @contextmanager
    def serving(self, request: Request) -> Iterator[Scheduler]:
        """Return its scheduler, for the duration of one request."""
        request.group = self.name
        number = next(self._begun)
        self._open[number] = None
        try:
            yield self._scheduler
        finally:
            del self._open[number]

    @property
    def open(self) -> int:
        """Return the number of requests that it serves."""
        return len(self._open)

    def show(self, gateway: str) -> None:
        """Set the metrics of the requests that wait."""
        self._scheduler.show(gateway, self.name)

    def update(self, prefills: dict[_Key, Instance], decodes: dict[_Key, Instance]) -> None:
        """Replace the instances; see ``Scheduler.update``."""
        before, self.instances = self.instances, prefills | decodes
        next_request = next(self._begun)
        for key, instance in before.items():
            if key not in self.instances:
                self._left[instance] = next_request
        for instance in self.instances.values():
            self._left.pop(instance, None)
        self._scheduler.update(list(prefills.values()), list(decodes.values()))

    def forget(self) -> None:
        """Forget the instances that have left and serve no request of this group any more.

        One that another group has now may never be without requests: it is forgotten when all
        requests have ended that began before it left.
        """
        oldest = next(iter(self._open), None)
        for instance, next_request in list(self._left.items()):
            over = oldest is None or oldest >= next_request
            if over or not (instance.load.open or instance.load.offers):
                del self._left[instance]
                self._scheduler.let_go(instance)

    def retire(self) -> None:
        """Stop connecting its instances, since no new request will come."""
        self._linking.cancel()


class Groups:
    """Keeps the groups of one gateway as its deployment changes.

    Args:
        gateway: name of the gateway's model, for the metrics.
        connect: opens a channel to an instance.
        rng: source of jitter.
        scheduler: makes the scheduler of a group.
    """

    def __init__(
        self,
        gateway: str,
        connect: OpenChannel,
        metrics: Registry,
        rng: random.Random,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self.told: Told = lambda name, reply: None  # noqa: ARG005
        """Called in the middle of a request's work, which it must not change."""
        self._gateway = gateway
        self._connect = connect
        self._metrics = metrics
        self._rng = rng
        self._scheduler = scheduler
        self._current: dict[str, Group] = {}
        self._retired: list[Group] = []
        self._instances: dict[_Key, Instance] = {}
        self._turns = itertools.count()

    def take(
        self, deployment: config.Deployment, numbers: Mapping[str, int] = _NO_NUMBERS
    ) -> dict[str, Group]:
        """Return every group of a deployment by its name.

        A group that was there before goes on, with the instances that it has now. Instances that
        stay keep their channel. The others finish what they have begun: see ``sweep``.

        Args:
            numbers: numbers of the assignments that instances have, by name, where it is not FIRST.
        """
        groups = {
            group.name: self._group(deployment, group, numbers)
            for scenario in deployment.served
            for group in scenario.groups
        }
        going = set(groups.values())
        for group in self._current.values():
            if group not in going:
                group.retire()
                self._retired.append(group)
        self._current = groups
        return groups

    def lose(self, name: str, epoch: bytes) -> None:
        """Note that a process of an instance is gone; see ``Channel.lose``.

        An instance that another deployment has moved is notified at both places: the former place
        may still serve requests, and no two processes have the same epoch.
        """
        for (_, instance, *_), reached in self._instances.items():
            if instance == name:
                reached.lose(epoch)

    def show(self) -> None:
        """Set the metrics of the requests that wait in each group."""
        for group in (*self._retired, *self._current.values()):
            group.show(self._gateway)

    async def sweep(self) -> None:
        """Close groups and instances that are in no deployment and serve no request any more.

        Groups forget the instances that have left them. The gauges of a closed group vanish.
        """
        for group in [group for group in self._retired if not group.open]:
            self._retired.remove(group)
            if group.name not in self._current:
                self._metrics.drop(gateway=self._gateway, group=group.name)
            group.update({}, {})  # so that instances that stay do not call it any more
        for group in self._current.values():
            group.forget()
        used = {
            key for group in (*self._current.values(), *self._retired) for key in group.instances
        }
        for key in [key for key in self._instances if key not in used]:
            load = self._instances[key].load
            if not (load.open or load.offers):
                await self._instances.pop(key).close()

    async def close(self) -> None:
        for group in self._current.values():
            group.retire()
        for instance in self._instances.values():
            await instance.close()

    def _group(
        self, deployment: config.Deployment, spec: config.Group, numbers: Mapping[str, int]
    ) -> Group:
        prefills = self._reach(deployment, "prefill", spec.prefill, numbers)
        decodes = self._reach(deployment, "decode", spec.decode, numbers)
        current = self._current.get(spec.name)
        if current is not None:
            if current.instances != prefills | decodes:
                current.update(prefills, decodes)
            return current
        strategy = deployment.transfer.strategy
        kv_links = KVLinks(
            list(prefills.values()),
            list(decodes.values()),
            None if strategy == "auto" else strategy == "layered",
            self._gateway,
            self._metrics,
            spec.name,
        )
        scheduler = self._scheduler(
            list(prefills.values()),
            list(decodes.values()),
            kv_links,
            self._metrics,
            gateway=deployment.gateway,
            prefill=deployment.prefill,
            decode=deployment.decode,
            rng=self._rng,
        )
        return Group(spec.name, prefills | decodes, scheduler, kv_links)

    def _reach(
        self,
        deployment: config.Deployment,
        role: config.Role,
        names: tuple[str, ...],
        numbers: Mapping[str, int],
    ) -> dict[_Key, Instance]:
        servers = deployment.instances(role)
        found = {}
        for name in names:
            server, number = servers[name], numbers.get(name, FIRST)
            key: _Key = role, name, server.host, server.grpc_port, number
            if (instance := self._instances.get(key)) is None:
                instance = Instance(name, self._connect(name, server, number))
                instance.reassigned = partial(self._tell, name)
                self._instances[key] = instance
                if self._current:  # the others have requests already
                    ramp.begin(instance.load)
            elif instance.left:
                instance.back()
            found[key] = instance
        return found

    def _tell(self, name: str, reply: Reassigned) -> None:
        self.told(name, reply)

    async def inspect(self, name: str, server: config.Server) -> Inspected | None:
        """Ask an instance what it is, whatever its assignment; None: it does not answer.

        The channel is closed afterwards, since an open stream would keep the instance's model from
        being unloaded.
        """
        instance = Instance(name, self._connect(name, server, ANY))
        try:
            reply = await instance.ask(Inspect(instance.new_id()), INSPECT_S)
        except errors.InstanceError:
            return None
        finally:
            await instance.close()
        return reply if isinstance(reply, Inspected) else None

    async def inspect_next(self) -> None:
        """Ask the next of all members of groups what it is, in turn, and tell what it says.

        A member that no request reaches would otherwise never refuse one.
        """
        members = [one for group in self._current.values() for one in group.instances.values()]
        if not members:
            return
        instance = members[next(self._turns) % len(members)]
        try:
            reply = await instance.ask(Inspect(instance.new_id()), INSPECT_S)
        except errors.InstanceError:
            return  # requests and probes notice it
        if isinstance(reply, Inspected):
            self.told(instance.name, reply)
