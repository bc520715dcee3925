"""Test for the command that measures the cost of a request as its group grows."""

from __future__ import annotations

import asyncio

from perf import group_cost

from pdserve.scheduling.link_plan import PEERS


def test_it_measures_each_state() -> None:
    cost = asyncio.run(group_cost.measure(64, 20))
    assert cost.links >= 32 * PEERS
    assert cost.mib > 0
    assert all(milliseconds > 0 for milliseconds in cost.request_ms.values())
    table = group_cost.table([cost, cost])
    assert table.row_count == 2
    assert next(iter(table.columns[1].cells)).endswith("(1.00 x)")
