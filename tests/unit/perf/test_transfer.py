"""Test for the transfer benchmark, at a small size."""

from __future__ import annotations

import pytest
from perf.transfer import report
from perf.transfer.__main__ import LINKS, Link, measure


@pytest.mark.parametrize("name", ["shm", "cma"])
def test_every_way_of_small_kv_caches(name: str) -> None:
    points = measure(name, Link(LINKS[name].transport, {}, [1]), "Llama-3-8B", quick=True)
    assert [(point.mib, point.block) for point in points] == [(2.0, 16), (4.0, 32)]
    for point in points:
        assert point.detail == ("mapped" if name == "shm" else "cma")
        assert point.ways.keys() == ({"whole"} if name == "shm" else {"whole", "direct"})
        assert point.chosen in point.ways
        taken = [point.memcpy, point.scatter, point.one_run, point.per_block, point.spanning]
        taken += point.ways.values()
        if name == "cma":
            taken += [point.pull, point.raw, point.raw_again]
        assert all(taken), taken
    assert {budget.bound for budget in report.limits(points)} == {"at least"}
    assert len(report.table(points).rows) == 2


def test_a_comparison_knows_its_worst_point_and_how_many_are_within() -> None:
    ratios = report.Comparison("time", [0.9, 1.0, 1.2, 0.5], "x", 1.0)
    assert (ratios.bound, ratios.worst, ratios.within) == ("at most", 1.2, 75)
    saved = report.Comparison("saved", [50.0, 90.0], "%", 46)
    assert (saved.bound, saved.worst, saved.within) == ("at least", 50.0, 100)
