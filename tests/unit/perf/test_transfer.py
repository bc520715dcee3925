"""The transfer benchmark measures what it says, small."""

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
