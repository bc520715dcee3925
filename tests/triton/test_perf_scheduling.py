"""Tests for the client and servers of the scheduling benchmark, with the real server."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from perf.scheduling import client, servers
from perf.scheduling.__main__ import PUBLISHED_S, unloaded
from perf.scheduling.samples import LATE, UNAVAILABLE, idle_s, kept
from perf.scheduling.servers import Offers
from perf.scheduling.workload import Ask

pytestmark = [pytest.mark.triton, pytest.mark.alone]


def test_what_is_answered_and_refused_is_seen_by_the_client() -> None:
    """Six at once on two prefills that take one each; the limit allows two in a row of 0.4 s."""
    with servers.serving(servers.deployment("pool")) as server:
        idle = unloaded(server)
        assert 0 < idle.added_s < 0.1
        assert 0 < idle.way_s < 0.1
        time.sleep(PUBLISHED_S)
        before = Offers.of(server)
        chains = [
            [Ask(0.0, 4000, 1.0, seed), Ask(5.0, 4000, 5.0, -seed % 2**32)]
            for seed in range(1001, 1007)
        ]
        found = client.run(chains, [server.grpc])
        time.sleep(PUBLISHED_S)
        after = Offers.of(server)
    burst, rest = found[:6], found[6:]
    assert Counter(one.good for one in burst) == {True: 4, False: 2}, burst
    assert all(UNAVAILABLE in one.error for one in burst if not one.good)
    late = [one for one in burst if LATE in one.error]
    assert kept(burst) == pytest.approx(4 / (4 + len(late)))
    assert all(one.good for one in rest), "each was sent when the one before had ended"
    assert {one.prefill for one in found if one.good} == {"prefill_0", "prefill_1"}
    assert all(one.prefill_s == pytest.approx(0.4, abs=0.05) for one in found if one.good)
    assert all(0 < one.way_s < (one.ttft or 0.0) - one.prefill_s for one in found if one.good)
    taken = after.made - before.made - (after.rejected - before.rejected)
    assert taken == len([one for one in found if not one.refused])
    assert max(idle_s(burst, 2), default=0.0) < 0.1


def test_every_gateway_and_group_serves() -> None:
    with servers.serving(servers.deployment("groups")) as server:
        chains = [
            [Ask(0.0, 200, 5.0, seed, servers.SCENARIOS[seed % 2], outputs=2)] for seed in range(6)
        ]
        found = client.run(chains, [server.grpc])
    assert {(one.ask.scenario, one.prefill) for one in found if one.good} == set(
        zip(servers.SCENARIOS, ("prefill_0", "prefill_1"), strict=True)
    )
    with servers.serving(servers.deployment("gateways")) as server:
        addresses = [one.grpc for one in servers.gateways(server)]
        chains = [[Ask(0.0, 200, 5.0, seed)] for seed in range(8)]
        found = client.run(chains, addresses)
        assert all(one.good for one in found), found
        assert Counter(one.gateway for one in found) == dict.fromkeys(range(servers.GATEWAYS), 2)
        time.sleep(PUBLISHED_S)
        assert Offers.of(server).made >= 8


def test_another_policy_serves() -> None:
    """The third waits for a prefill that computes, though the other one is idle."""
    with servers.serving(servers.deployment("pool"), "round_robin") as server:
        asks = [Ask(0.0, 4000, 5.0, 1), Ask(0.1, 100, 5.0, 2), Ask(0.2, 100, 5.0, 3)]
        long, short, behind = client.run([[ask] for ask in asks], [server.grpc])
    assert all(one.good for one in (long, short, behind))
    assert behind.prefill == long.prefill != short.prefill
    assert (behind.first or 0.0) > (long.first or 0.0) > (short.first or 0.0)
