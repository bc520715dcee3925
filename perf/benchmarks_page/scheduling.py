"""Tables of scheduling: scheduling.json, scheduling-poisson.json, group_cost.json."""

from __future__ import annotations

from typing import Any

from perf.benchmarks_page.markdown import number, percent, table
from perf.benchmarks_page.result import Result, against_target

POLICIES = {
    "ideal": "ideal: no overhead, in order of arrival",
    "ideal by limit": "ideal: no overhead, in order of limits",
    "on_demand": "**on-demand forwarding (P/D-Serve)**",
    "round_robin": "round robin",
    "fewest_streams": "fewest open streams, a queue in each prefill",
    "shortest_queue": "shortest queue, by reports 100 ms old",
    "pending_tokens": "fewest waiting tokens, by reports 100 ms old",
}
LAYOUTS = {"pool": "one pool of 2 + 2", "groups": "two groups of 1 + 1"}
Point = dict[str, Any]


def _points(name: str, part: str) -> list[Point]:
    return [point for point in Result(name).results["points"] if point["part"] == part]


def poisson() -> str:
    return _in_time(_points("scheduling-poisson", "poisson"), "{} % load")


def users() -> str:
    return _in_time(_points("scheduling", "users"), "{} users")


def _in_time(points: list[Point], level: str) -> str:
    levels = sorted({point["level"] for point in points})
    good = {(point["policy"], point["level"]): point["good"] for point in points}
    rows = [
        (name, *(percent(good[policy, one]) for one in levels))
        for policy, name in POLICIES.items()
        if (policy, levels[0]) in good
    ]
    return table(("policy", *(level.format(one) for one in levels)), rows)


def poisson_targets() -> str:
    result = Result("scheduling-poisson")
    rows = [
        (f"in time at {level} % load, of the ideal's", f"{level} %: within limit, of the ideal")
        for level in (50, 80, 100, 120, 150)
    ]
    rows += [
        (
            "in time, of the requests that a prefill has accepted, at the worst load",
            "accepted and within limit, worst load",
        ),
        (
            "refused although a prefill had been idle for 25 ms",
            "refused while a prefill was idle for 25 ms",
        ),
    ]
    return against_target([(plain, result.budget(what)) for plain, what in rows])


def paper() -> str:
    """Return the comparison of the paper's figure 14a, interpolated between the measured numbers of
    users."""
    result = Result("scheduling")
    rows = [
        ("users at which the old way has 57 % in time", "users at which fewest_streams has 57%"),
        (
            "on-demand forwarding is ahead there by, percentage points",
            "there, on_demand is ahead by",
        ),
        ("the ideal in order of arrival is ahead by", "there, ideal is ahead by"),
        ("the ideal in order of limits is ahead by", "there, ideal by limit is ahead by"),
    ]
    cells = [(plain, number(result.budget(what).measured)) for plain, what in rows]
    return table(("what", "measured"), cells)


def traces() -> str:
    head = ("prompts", "policy", "TTFT of short prompts, median, ms", "99th percentile, ms")
    rows = []
    for part in ("conversations", "code"):
        points = {point["policy"]: point["short_ttft_ms"] for point in _points("scheduling", part)}
        rows += [
            (part, name, number(points[policy]["p50"]), number(points[policy]["p99"]))
            for policy, name in POLICIES.items()
            if policy in points
        ]
    return table(head, rows)


def tides() -> str:
    kinds = {"tide": "no shared prefixes", "tide, prefixes": "70 % begin with a shared prefix"}
    rows = []
    for part, kind in kinds.items():
        some = _points("scheduling", part)
        points = {(point["layout"], point["policy"]): point for point in some}
        for layout, name in LAYOUTS.items():
            ours = points[layout, "on_demand"]
            best = points[layout, "ideal"]["good"]
            spread = f"{number(ours['spread'])} x"
            rows.append((kind, name, percent(ours["good"]), percent(best), spread))
    head = ("prompts", "instances", "in time", "in time, ideal", "slow forward / fast forward")
    return table(head, rows)


def gateways() -> str:
    result = Result("scheduling")
    rows = [
        (
            "in time at the worst of the four gateways, of their mean",
            "4 gateways: the worst, by the mean",
        ),
        ("the same for the ideal: what chance alone does", "  by chance alone (ideal)"),
        ("in time at all four, of the ideal's", "4 gateways: within limit, of the ideal"),
        (
            "offers that a busy prefill refused, for each that was accepted",
            "4 gateways: rejections for each accepted",
        ),
    ]
    return against_target([(plain, result.budget(what)) for plain, what in rows])


def costs() -> str:
    result = Result("scheduling")
    rows = [
        ("a refused offer, from sending it to the answer", "a rejection"),
        ("CPU time of a refused offer, both sides", "  CPU, gateway's side included"),
        (
            "added to a request if there are 200 instances in place of 2, all idle",
            "200 instances in place of 2: added to a request",
        ),
        (
            "the same in CPU time, for a request that waits",
            "200 instances in place of 2: CPU of one that waits",
        ),
    ]
    return against_target([(plain, result.budget(what)) for plain, what in rows])


def group_costs() -> str:
    measured = Result("group_cost").results
    first = measured[0]["request_ms"]
    rows = [
        (
            number(cost["instances"]),
            *(
                f"{milliseconds:.3f} ({milliseconds / first[state]:.2f} x)"
                for state, milliseconds in cost["request_ms"].items()
            ),
            *(number(cost[what]) for what in ("links", "usable_s", "mib")),
        )
        for cost in measured
    ]
    states = [f"{state}: ms" for state in first]
    return table(("instances", *states, "KV links", "usable after: s", "memory: MiB"), rows)
