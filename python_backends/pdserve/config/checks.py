"""Checks of a deployment as a whole, whose fields are valid one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from pdserve.config import addresses, backend_models, control_checks, flexible
from pdserve.config.deployment import Deployment, Group
from pdserve.config.llm_options import LlmOptions
from pdserve.config.names import GATEWAY_MODELS, ROLES, Role


def problems(deployment: Deployment) -> Iterator[str]:
    """Yield the problems, in sentences that name the field, its value and what is allowed."""
    groups = [group for scenario in deployment.scenarios for group in scenario.groups]
    yield from _clashes(deployment, groups)
    yield from addresses.problems(deployment.servers)
    spares = deployment.control.spares if deployment.control else ()
    for role in ROLES:
        instances = deployment.instances(role)
        if not instances:
            yield f"no server has a {role} instance; at least 1 is needed"
        if deployment.scenarios:
            yield from _misplaced(role, instances, groups, spares)
    yield from _misfit(deployment)
    yield from flexible.problems(deployment)
    slots, batch = deployment.prefill.slots, deployment.prefill.batch
    if batch > slots and batch != type(deployment.prefill)().batch:
        yield f"prefill.batch: {batch}; allowed: 1 to prefill.slots, {slots}"
    for scenario in deployment.scenarios:
        if not any(group.share for group in scenario.groups):
            yield f"scenario {scenario.name}: every group's share is 0; at least 1 must have one"
    scenarios = [scenario.name for scenario in deployment.served]
    default = deployment.gateway.default_scenario
    if deployment.control:
        yield from control_checks.problems(deployment, deployment.control)
    if default not in scenarios:
        yield f"gateway.default_scenario: {default} is none of: {', '.join(scenarios)}"


def _clashes(deployment: Deployment, groups: list[Group]) -> Iterator[str]:
    """Yield the problems of names that are used more than once."""
    servers = deployment.servers
    for name in GATEWAY_MODELS:
        if any(name in (*server.prefill, *server.decode) for server in servers):
            yield (
                f"no instance may be named {name}: gateways have a model of that name "
                f"(as well as {', '.join(other for other in GATEWAY_MODELS if other != name)})"
            )
    for what, names in (
        ("server", [server.name for server in servers]),
        ("instance", [name for server in servers for name in (*server.prefill, *server.decode)]),
        ("scenario", [scenario.name for scenario in deployment.scenarios]),
        ("group", [group.name for group in groups]),
    ):
        for name in names:
            if names.count(name) > 1:
                yield f"{what} {name} is used more than once"


def _misfit(deployment: Deployment) -> Iterator[str]:
    """Yield the settings that do not fit the kind of engine."""
    engine = deployment.engine
    instances: dict[str, Role] = {
        name: role for role in ROLES for name in deployment.instances(role)
    }
    if engine.gpus and engine.kind != "tensorrt_llm":
        yield f"engine.gpus is of kind tensorrt_llm; this deployment's is {engine.kind}"
    for name in engine.gpus:
        if name not in instances:
            yield f"engine.gpus: there is no instance {name}; there are: {', '.join(instances)}"
    yield from backend_models.problems(engine.kind, engine.models, instances)
    if engine.tensorrt_llm != LlmOptions() and engine.kind != "tensorrt_llm":
        yield f"engine.tensorrt_llm: this deployment's kind of engine is {engine.kind}"
    if engine.external:
        yield from _external_misfit(deployment, instances)


def _external_misfit(deployment: Deployment, instances: dict[str, Role]) -> Iterator[str]:
    """Yield the settings that do not fit an engine that transfers KV caches itself."""
    engine, transfer = deployment.engine, deployment.transfer
    if transfer.strategy != "auto" or transfer.transports is not None:
        yield f"transfer: engine {engine.kind} moves KV caches itself: no strategy, no transports"
    yield from engine.tensorrt_llm.problems()
    for name, gpus in engine.gpus.items():
        role = instances[name]
        ranks = deployment.ranks(role)
        if len(gpus) != ranks:
            yield f"engine.gpus: {name} has {len(gpus)}; a {role} has {ranks} ranks"


def _misplaced(
    role: Role, instances: Collection[str], groups: Iterable[Group], spares: Collection[str]
) -> Iterator[str]:
    """Yield the instances of a role that are not in exactly one group, and names of no instance.

    A spare is in none.
    """
    homes: dict[str, str] = {}
    for group in groups:
        for name in getattr(group, role):
            if name not in instances:
                there_are = ", ".join(instances)
                yield f"group {group.name}: no server has a {role} {name}; there are: {there_are}"
            if name in homes:
                yield f"{role} {name} is in the groups {homes[name]} and {group.name}"
            homes[name] = group.name
    for name in instances:
        if name not in homes and name not in spares:
            yield f"{role} {name} is in no group; with scenarios, every instance is in one"
