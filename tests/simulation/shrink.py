"""Shrink a plan to the least that still breaks an invariant."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.simulation.world import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from tests.simulation.plan import Plan

    T = TypeVar("T")


def breaks(plan: Plan) -> str:
    """Return what a plan breaks; empty: nothing."""
    try:
        simulate(plan)
    except AssertionError as error:
        return str(error)
    return ""


def shrink(plan: Plan) -> Plan:
    """Leave out the faults and requests without which a plan still breaks something."""
    faults = _least(plan.faults, lambda some: bool(breaks(replace(plan, faults=some))))
    plan = replace(plan, faults=faults)
    requests = _least(
        plan.requests, lambda some: bool(some) and bool(breaks(replace(plan, requests=some)))
    )
    return replace(plan, requests=requests)


def _least(some: Sequence[T], enough: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """Leave out pieces, the large ones first, as long as what is left is enough."""
    left, size = tuple(some), len(some)
    while size:
        start = 0
        while start < len(left):
            fewer = left[:start] + left[start + size :]
            if enough(fewer):
                left = fewer
            else:
                start += size
        size //= 2
    return left
