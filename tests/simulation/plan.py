"""The plan of a seed: the size of a world, the requests that come, and what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from pdserve import config
from pdserve.config import checks
from tests.simulation import asking, faults, layouts, moves
from tests.simulation.layouts import Names

if TYPE_CHECKING:
    from collections.abc import Collection

    from perf.baselines.policies import PolicyName

    from pdserve.transfer.consumer.cost_model import Strategy
    from tests.simulation.asking import Asked
    from tests.simulation.faults import Fault
    from tests.simulation.layouts import Layout

PAGE = 4096
STRATEGIES: dict[bool | None, Any] = {None: "auto", True: "layered", False: "whole"}
# An arena has enough room if it is this many times as large as the requests that it holds, since
# its free memory is not in one piece.
ROOMY = 2


@dataclass(frozen=True)
class Plan:
    """The plan of one world. The same seed gives the same plan, whatever happens in the world."""

    seed: int
    calm: bool
    """Nothing goes wrong in this world, so that the bounds of its invariants are tight."""
    gateways: int
    prefills: int
    decodes: int
    profile: dict[str, Any]
    prefill: config.Prefill
    decode: config.Decode
    gateway: config.Gateway
    policy: PolicyName
    """The policy by which a gateway chooses a prefill for a request."""
    longest_bytes: int
    """The size of the longest request's KV cache."""
    arena_bytes: int
    layouts: tuple[Layout, ...]
    """The first layout is that of the beginning and the end."""
    layered: bool | None
    strategy: Strategy | None
    latency_s: float
    """The time that it takes to read a word of a prefill's memory; 0: the memory is mapped."""
    bytes_per_s: float
    timeout_s: float
    """The time limit of a pull."""
    delay_s: float
    """The longest delay of a message, except for those that are late."""
    tail: float
    loss: float
    retries: tuple[float, float]
    """The number of retries that may be made at once, and of those that each request adds."""
    requests: tuple[Asked, ...] = field(repr=False)
    faults: tuple[Fault, ...] = field(repr=False)

    @property
    def names(self) -> Names:
        return Names(self.prefills, self.decodes)

    @property
    def contenders(self) -> int:
        """Return how many schedulers, at most, ask the same instances at the same time."""
        changes = sum(fault.kind == "take" for fault in self.faults)
        return self.gateways + 2 * changes

    def deployment(self, layout: int = 0, away: Collection[str] = ()) -> config.Deployment:
        """Return the deployment that a gateway serves by while some instances are away.

        Args:
            layout: the index of the layout.
        """
        scenarios = layouts.without(self.layouts[layout], away)
        made = config.Deployment(
            model="emulated",
            servers=layouts.servers(scenarios, self.names),
            prefill=self.prefill,
            decode=self.decode,
            gateway=self.gateway,
            transfer=config.Transfer(strategy=STRATEGIES[self.layered]),
            scenarios=scenarios,
            control=config.Control("simulated") if self.moves else None,
        )
        assert not list(checks.problems(made))
        return made

    @property
    def moves(self) -> bool:
        """Return whether instances get other assignments."""
        return any(fault.kind == "move" for fault in self.faults)

    @property
    def fair(self) -> bool:
        """Return whether the order in which requests are taken is checked.

        It is not where something fails, nor where a request may have to wait for room.
        """
        roomy = self.arena_bytes >= ROOMY * self.prefill.slots * self.longest_bytes
        return self.calm and self.policy == "on_demand" and roomy


def draw(seed: int) -> Plan:
    """Draw the plan of a seed."""
    rng = random.Random(seed)
    calm = rng.random() < 0.3
    gateways, prefills, decodes = (
        rng.choice(some) for some in ((1, 2, 2, 3), (1, 1, 2, 3), (1, 2, 3))
    )
    profile: dict[str, Any] = {
        "layers": rng.choice((1, 1, 2, 4)),
        "prefill": {
            "base_ms": rng.choice((1.0, 4.0, 10.0, 30.0)),
            "per_token_ms": rng.choice((0.0, 0.05, 0.2)),
        },
        "decode": {"base_ms": rng.choice((1.0, 3.0, 8.0))},
    }
    slots = rng.choice((1, 1, 2, 4))
    prefill = config.Prefill(
        slots=slots,
        batch=max(slots // (1 + (seed % 3 == 2)), 1),
        batch_tokens=rng.choice((16, 64, 512)),
        lease_s=10.0 if calm else rng.uniform(0.5, 3.0),
    )
    longest = rng.choice((40, 80, 160))
    blocks = -(-longest // 16) * rng.choice((1, 2, 8))
    decode = config.Decode(
        slots=rng.choice((1, 2, 4, 16)),
        blocks=blocks,
        response_cost_ms=rng.choice((0.0, 0.6, 5.0)),
    )
    stall_s = rng.uniform(1.5, 4.0)
    policies: tuple[PolicyName, ...] = ("on_demand",) * 8 + ("round_robin", "shortest_queue")
    policy = rng.choice(policies)
    gateway = config.Gateway(
        stall_s=stall_s,
        local=rng.choice(("off", "off", "off", "auto", "on")),
        local_tokens=rng.choice((8, 32)),
    )
    range_bytes = -(-longest * 128 * profile["layers"] // PAGE) * PAGE
    plan = Plan(
        seed=seed,
        calm=calm,
        gateways=gateways,
        prefills=prefills,
        decodes=decodes,
        profile=profile,
        prefill=prefill,
        decode=decode,
        gateway=gateway,
        policy=policy,
        longest_bytes=range_bytes,
        arena_bytes=range_bytes * rng.choice((1, 2, 8)),
        layouts=(layouts.whole(Names(prefills, decodes)),),
        layered=rng.choice((None, None, True, False)),
        strategy=rng.choice((None, None, "whole", "direct")),
        latency_s=rng.choice((0.0, rng.uniform(2e-5, 5e-4))),
        bytes_per_s=10 ** rng.uniform(5.0, 8.0),
        timeout_s=30.0 if calm else rng.uniform(1.5, 6.0),
        delay_s=rng.choice((1e-5, 2e-4, 2e-3, 1e-2)),
        tail=0.0 if calm else rng.choice((0.0, 0.0, 0.02, 0.1)),
        loss=0.0 if calm else rng.choice((0.0, 0.0, 0.002, 0.02)),
        retries=(256.0, 0.2) if calm else rng.choice(((256.0, 0.2), (256.0, 0.2), (1.0, 0.05))),
        requests=(),
        faults=(),
    )
    requests = asking.draw(plan, longest, rng)
    last = requests[-1].at
    drawn = (
        ()
        if calm
        else tuple(
            sorted(
                (faults.draw(plan, last + 0.2, rng) for _ in range(rng.randint(0, 6))),
                key=lambda fault: fault.at,
            )
        )
    )
    leaves = [
        faults.leave(plan, last + 0.2, rng)
        for _ in range(rng.choice((0, 0, 1, 3)))
        if plan.policy == "on_demand" and prefills + decodes > 2
    ]
    drawn = tuple(sorted((*drawn, *leaves), key=lambda fault: fault.at))
    return _moved(_grouped(replace(plan, requests=asking.answered(requests, seed), faults=drawn)))


def _grouped(plan: Plan) -> Plan:
    """Draw scenarios and groups, the scenario that each request names, and the changes."""
    rng = random.Random(f"{plan.seed} groups")
    if rng.random() < 0.25:
        return plan
    if rng.random() < 0.5:
        plan = replace(plan, prefills=max(plan.prefills, 2), decodes=max(plan.decodes, 2))
    drawn = tuple(layouts.draw(plan.names, rng) for _ in range(3))
    labels = ("", "", *layouts.SCENARIOS, layouts.UNKNOWN)
    requests = tuple(
        replace(asked, fields={**asked.fields, "scenario": rng.choice(labels)})
        for asked in plan.requests
    )
    changes = rng.choice((0, 1, 2)) if plan.policy == "on_demand" else 0
    until = plan.requests[-1].at + 0.2
    takes = [faults.take(plan, rng.randrange(1, 3), until, rng) for _ in range(changes)]
    return replace(
        plan,
        layouts=drawn,
        gateway=msgspec.structs.replace(plan.gateway, strict=rng.random() < 0.3),
        requests=requests,
        faults=tuple(sorted((*plan.faults, *takes), key=lambda fault: fault.at)),
    )


def _moved(plan: Plan) -> Plan:
    """Draw the moves of instances; deployments do not change in such a world."""
    rng = random.Random(f"{plan.seed} moves")
    drawn = moves.draw(plan, plan.requests[-1].at + 0.2, rng)
    if not drawn or plan.policy != "on_demand" or rng.random() < 0.6:
        return plan
    others = [one for one in plan.faults if one.kind not in ("leave", "take")]
    return replace(plan, faults=tuple(sorted((*others, *drawn), key=lambda fault: fault.at)))
