"""What a deployment's file allows the controller to do, as its decisions take it."""

from __future__ import annotations

from pdserve.config import Deployment, GroupBounds, Hours
from pdserve.config import Tide as TideSection
from pdserve.config.control import DAYS
from pdserve.control.policy import Bounds, Policy, Tide, Window


def policy(deployment: Deployment) -> Policy:
    """Return the policy of a deployment with a section ``control``."""
    control = deployment.control
    assert control is not None
    given = control.groups
    bounds = {}
    for scenario in deployment.served:
        for group in scenario.groups:
            own = given.get(group.name, GroupBounds())
            bounds[group.name] = Bounds(
                own.least("prefill", len(group.prefill)),
                own.least("decode", len(group.decode)),
                own.most,
            )
    return Policy(
        ratio=control.ratio,
        bounds=bounds,
        tides=tuple(map(_tide, control.tides)),
        budget=control.budget,
        drain_s=deployment.drain_s,
        load_s=deployment.engine.load_s,
    )


def _tide(given: TideSection) -> Tide:
    some = not given.whole
    return Tide(
        group=given.group,
        to=given.to,
        windows=tuple(map(_window, given.hours)),
        prefills=(given.prefill or 0) if some else None,
        decodes=(given.decode or 0) if some else None,
        volume=given.volume,
    )


def _window(hours: Hours) -> Window:
    days = frozenset(DAYS.index(day) for day in hours.days)
    return Window(_seconds(hours.start), _seconds(hours.end), days)


def _seconds(clock: str) -> float:
    """Return the seconds after midnight of HH:MM."""
    hour, minute = clock.split(":")
    return 3600.0 * int(hour) + 60.0 * int(minute)
