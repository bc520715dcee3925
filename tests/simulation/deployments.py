"""Every request is served by its scenario's groups, and every group by its own instances."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pdserve.observability import catalogue
from tests.unit.group_state import known, state

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdserve import config
    from pdserve.scheduling.scheduler import Scheduler
    from tests.simulation.channels import Wire
    from tests.simulation.clients import Client
    from tests.simulation.gateways import Gateway
    from tests.simulation.plan import Plan


class Deployments:
    """Checks of the scenarios and groups of one world."""

    def __init__(self, plan: Plan, expect: Callable[[bool, str], None]) -> None:
        self._plan = plan
        self._expect = expect
        self._routed: dict[tuple[Gateway, str], Counter[str]] = {}
        """The number of requests of a scenario since the last change or failure, by group."""

    # ------------------------------------------------------------------- requests

    def begins(self, client: Client, scheduler: Scheduler) -> None:
        """Check the scenario and the group of a request that has reached a scheduler."""
        gateway, request = client.gateway, client.request
        assert request is not None
        deployment = gateway.deployment
        scenario = served_as(client, deployment)
        name = scenario.name if scenario else "none"
        self._expect(request.scenario == name, f"{client.brief} is of scenario {name}")
        if scenario is None:
            return
        shares = {group.name: group.share for group in scenario.groups if group.share}
        self._expect(request.group in shares, f"{client.brief} is in no group of {name}")
        current = gateway.groups
        ours = current.get(request.group)
        self._expect(ours is scheduler, f"{client.brief} is in a group that is gone")
        well = [current[group].healthy for group in shares]
        failed = any(well) and not scheduler.healthy
        self._expect(not failed, f"{client.brief} is in a group that has failed")
        if all(well):
            self._in_turn(gateway, request.group, name, shares)
        else:
            self._routed.pop((gateway, name), None)

    def _in_turn(
        self, gateway: Gateway, group: str, scenario: str, shares: dict[str, float]
    ) -> None:
        counts = self._routed.setdefault((gateway, scenario), Counter())
        counts[group] += 1
        # After a failure, the turns of the healthy groups do not begin with the first group.
        most = len(shares) * (1 if self._plan.calm else 2)
        for one, share in shares.items():
            due = counts.total() * share / sum(shares.values())
            told = f"{gateway.name}: {counts[one]} of {counts.total()} are in group {one}"
            self._expect(abs(counts[one] - due) < most, f"{told}, whose share is {share}")

    # ----------------------------------------------------------- another deployment

    def connects(self, gateway: Gateway, before: Wire) -> None:
        """Check that a gateway opens another channel to a worker only after closing the first."""
        what = f"{gateway.name} has a channel to {before.worker.name} already"
        self._expect(before.closed, what)

    def taken(self, gateway: Gateway, before: dict[str, Scheduler]) -> None:
        """Check that a group continues if it is in the deployments before and after a change."""
        for name, scheduler in gateway.groups.items():
            goes_on = before.get(name, scheduler) is scheduler
            self._expect(goes_on, f"{gateway.name} has made group {name} anew")
        for key in [key for key in self._routed if key[0] is gateway]:
            del self._routed[key]

    def swept(self, gateway: Gateway) -> None:
        """Check that what has left and serves nothing is closed and forgotten, but nothing else."""
        open_, serving = gateway.instances, self._serving(gateway)
        wanted = {name for scheduler in serving for name in gateway.members[scheduler]}
        for name, instance in open_.items():
            used = name in wanted or instance.load.open or instance.load.offers
            self._expect(bool(used), f"{gateway.name} keeps its channel to {name}, which has left")
        used = {one for group in gateway.all_groups for one in group.instances.values()}
        for one in gateway.service._groups._instances.values():
            idle = one not in used and not (one.load.open or one.load.offers)
            told = f"{gateway.name} keeps its channel to {one.name} under a former assignment"
            self._expect(not idle, told)
        for name in wanted:
            self._expect(name in open_, f"{gateway.name} has no channel to {name}")
        for name, scheduler in gateway.groups.items():
            links, pairs = scheduler._kv_links, scheduler._decode_stage._pairs
            for pair in (*links.table._links.known, *links.table._refused.known, *pairs.known):
                gone = set(pair) - open_.keys()
                self._expect(not gone, f"{gateway.name}: group {name} remembers {gone}")

    def _serving(self, gateway: Gateway) -> set[Scheduler]:
        """Return the schedulers of its groups, and those that serve what they have begun."""
        begun = {client.scheduler for client in gateway.clients.values() if client.open}
        return {*gateway.groups.values(), *(one for one in begun if one is not None)}

    # ------------------------------------------------------------- when all is over

    def left(self, gateway: Gateway) -> dict[str, object]:
        """Return what is left of groups that are gone."""
        tasks = [repr(task.get_coro()) for task in gateway.process.tasks]
        links = sum("KVLinks.run" in task for task in tasks)
        name, current = gateway.name, gateway.groups.values()
        counts: dict[str, object] = {
            f"{name}: groups that are gone": list(gateway.service._groups._retired),
            f"{name}: groups that go on": links - len(current),
        }
        for number, scheduler in enumerate(gateway.members):
            if scheduler not in current:
                lines = scheduler.prefills, scheduler.decodes
                counts[f"{name}, scheduler {number}: instances"] = [
                    one.name for line in lines for one in line.instances
                ]
        return counts

    def differs(self, gateway: Gateway, fresh: Gateway) -> str:
        """Return how its groups differ from those of a new gateway; empty: they do not differ."""
        groups, built = gateway.service._groups._current, fresh.service._groups._current
        if groups.keys() != built.keys():
            return f"{gateway.name} has the groups {list(groups)}"
        for name, group in groups.items():
            if state(group) != state(built[name]):
                return f"{gateway.name}: group {name} is {state(group)}, not {state(built[name])}"
            strange = known(group) - set(gateway.members[group._scheduler])
            if strange:
                return f"{gateway.name}: group {name} knows prefixes of {strange}"
        if _listeners(gateway) != _listeners(fresh):
            told = f"{_listeners(gateway)}, not {_listeners(fresh)}"
            return f"{gateway.name}: so many listen to its instances: {told}"
        if _links(gateway) != _links(fresh):
            return f"{gateway.name} tells of the links {_links(gateway)}, not {_links(fresh)}"
        return ""


def served_as(client: Client, deployment: config.Deployment) -> config.Scenario | None:
    """Return the scenario that a client's request belongs to; None: it is refused."""
    scenarios = {scenario.name: scenario for scenario in deployment.served}
    label, tenant = (client.asked.fields.get(name, "") for name in ("scenario", "tenant"))
    if label:
        if label not in scenarios and deployment.gateway.strict:
            return None
        return scenarios.get(label, scenarios["default"])
    for scenario in deployment.served:
        for rule in scenario.rules:
            of_tenant = rule.tenant is None or rule.tenant == tenant
            if of_tenant and client.beginning.startswith(rule.prefix or ""):
                return scenario
    return scenarios["default"]


def _listeners(gateway: Gateway) -> dict[str, int]:
    """Return how many listeners each instance has: a group that is gone has none."""
    return {name: len(instance.listeners) for name, instance in gateway.instances.items()}


def _links(gateway: Gateway) -> dict[tuple[str, ...], float]:
    """Return the number of KV links in a gateway's metrics, by group and state."""
    return {
        values[1:]: count
        for (metric, values), count in gateway.metrics._levels.items()
        if metric is catalogue.KV_LINKS and count
    }
