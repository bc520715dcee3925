"""Layouts: the scenarios of a deployment, and the groups of instances that serve each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from pdserve import config
from tests.simulation import words

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

T = TypeVar("T")
Layout = tuple[config.Scenario, ...]
SCENARIOS = ("default", "chat", "code")
GROUPS = ("a", "b", "c", "d")
UNKNOWN = "unknown"
"""A label that no scenario has."""


@dataclass(frozen=True)
class Names:
    """The names of a plan's instances."""

    prefills: int
    decodes: int

    @property
    def by_role(self) -> dict[config.Role, list[str]]:
        return {
            "prefill": [f"prefill_{i}" for i in range(self.prefills)],
            "decode": [f"decode_{i}" for i in range(self.decodes)],
        }


def whole(names: Names) -> Layout:
    """Return a layout with one group of all instances."""
    group = config.Group("a", *(tuple(some) for some in names.by_role.values()))
    return (config.Scenario("default", (group,)),)


def draw(names: Names, rng: random.Random) -> Layout:
    """Divide the instances among some groups, and these among some scenarios."""
    count = min(rng.choice((1, 2, 2, 2, 3)), names.prefills, names.decodes)
    homes = rng.sample(GROUPS, count)
    members = {role: _divide(some, homes, rng) for role, some in names.by_role.items()}
    groups = [
        config.Group(
            home,
            members["prefill"][home],
            members["decode"][home],
            share=rng.choice((1.0, 1.0, 1.0, 2.0, 0.5, 0.0)),
        )
        for home in homes
    ]
    served = SCENARIOS[: rng.choice((1, count))]
    of = _divide(groups, served, rng)
    return tuple(_scenario(name, of[name], rng) for name in served)


def _divide(
    some: Sequence[T], homes: Sequence[str], rng: random.Random
) -> dict[str, tuple[T, ...]]:
    """Divide some items among homes; each home gets at least one."""
    order = rng.sample(some, len(some))
    divided: dict[str, list[T]] = {home: [one] for home, one in zip(homes, order, strict=False)}
    for one in order[len(homes) :]:
        divided[rng.choice(homes)].append(one)
    return {home: tuple(ones) for home, ones in divided.items()}


def _scenario(name: str, groups: tuple[config.Group, ...], rng: random.Random) -> config.Scenario:
    if not any(group.share for group in groups):
        groups = (msgspec.structs.replace(groups[0], share=1.0), *groups[1:])
    rules = (config.Rule(tenant="a"), config.Rule(prefix=rng.choice(words.FIRST)))
    return config.Scenario(
        name,
        groups,
        rules=() if name == "default" else tuple(rng.sample(rules, rng.randint(0, 2))),
        shared_prefixes=rng.random() < 0.3,
    )


def without(layout: Layout, away: Collection[str]) -> Layout:
    """Take instances out of their groups, unless they are the last ones of their role there."""

    def here(some: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in some if name not in away) or some

    return tuple(
        msgspec.structs.replace(
            scenario,
            groups=tuple(
                msgspec.structs.replace(
                    group, prefill=here(group.prefill), decode=here(group.decode)
                )
                for group in scenario.groups
            ),
        )
        for scenario in layout
    )


def servers(layout: Layout, names: Names) -> tuple[config.Server, ...]:
    """Return a server for each instance of a layout; an instance always has the same address."""
    used = {
        name
        for scenario in layout
        for group in scenario.groups
        for name in (*group.prefill, *group.decode)
    }
    return tuple(
        config.Server(name, f"127.0.{len(role)}.{number}", **{role: (name,)})
        for role, some in names.by_role.items()
        for number, name in enumerate(some)
        if name in used
    )
