"""What a controller that knows the traffic would do, at the same cost of a switch."""

from __future__ import annotations

from functools import partial

from pdserve.control.policy import Policy
from pdserve.control.records import PINS, Pin
from tests.control_model.requests import Load
from tests.control_model.runs import GROUP, Run

LEADS_S = (0.0, 20.0, 40.0)
"""Times by which it acts ahead; the best of them counts."""
LOOK_S = 5.0


def policy(of: Policy) -> Policy:
    """Return the policy under which nothing changes a ratio but pins."""
    return Policy(
        ratio="never", drain_s=of.drain_s, switch_s=of.switch_s, load_s=of.load_s, tides=of.tides
    )


def foresee(run: Run, load: Load, lead_s: float) -> None:
    """Pin the group, at each moment, to the ratio that is best a little later."""

    def pin(t: float) -> None:
        then = min(t + lead_s, load.seconds - 1)
        prefills = load.mix(then).best(load.instances)
        run.controller.store[PINS + GROUP] = Pin(prefills, load.instances - prefills)

    t = 0.0
    while t < load.seconds:
        run.world.at(t, partial(pin, t))
        t += LOOK_S
