"""Tests for the scheduling benchmark: its requests, its ideal scheduler, and its statistics."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from perf.answers import Percentiles
from perf.scheduling import client, crowd, loads, points, report, servers
from perf.scheduling.ideal import ideal
from perf.scheduling.loads import Load
from perf.scheduling.points import Point, between, crossing, point, spread
from perf.scheduling.samples import Sample, good, idle_s, kept, ttft_ms
from perf.scheduling.servers import Offers
from perf.scheduling.workload import Ask, Limits, Tide, capacity, poisson, tidal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LATE = "UNAVAILABLE: no first token within the TTFT limit of 300 ms (320 ms waited)"
REFUSED = "UNAVAILABLE: no idle prefill within the TTFT limit of 300 ms (300 ms waited)"
WIDE = 1e9


def ask(due: float, tokens: int = 1000, limit_s: float = WIDE, **fields: int) -> Ask:
    return Ask(due, tokens, limit_s, 0, **fields)


def firsts(found: Sequence[Sample]) -> list[float | None]:
    return [None if one.first is None else round(one.first, 6) for one in found]


# ----------------------------------------------------------------------------------------- workload


def test_the_same_seed_asks_the_same() -> None:
    made = [poisson(random.Random(1), 20, [1000] * 50, Limits(0.005)) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] != poisson(random.Random(2), 20, [1000] * 50, Limits(0.005))
    assert len({chain[0].seed for chain in made[0]}) == 50, "no prompt is a prefix of another"


def test_poisson_arrivals_have_their_rate() -> None:
    chains = poisson(random.Random(0), 20, [1000] * 5000, Limits(0.005))
    gaps = np.diff([chain[0].due for chain in chains])
    assert np.mean(gaps) == pytest.approx(0.05, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.05, rel=0.05), "equal to the mean, so exponential"


def test_capacity_is_that_of_the_mean_prompt() -> None:
    assert capacity([500, 1500], 2) == pytest.approx(20)


def test_limits_are_by_the_unloaded_time() -> None:
    assert Limits(0.005)(1000) == pytest.approx(0.315)
    assert Limits(0.005, 100.0, 10.0)(100) == 10.0
    assert Limits(0.005, 100.0, 10.0)(2000) == pytest.approx(20.5)


def test_a_tide_rises_and_falls() -> None:
    tide = Tide("chat", 40, 0.5, 10.0, 0.25, (100, 200))
    assert tide.at(0.0) == pytest.approx(60)
    assert tide.at(5.0) == pytest.approx(20)
    chains = tidal(random.Random(0), [tide], 400.0, Limits(0.005))
    dues = np.array([chain[0].due for chain in chains])
    assert len(dues) == pytest.approx(40 * 400, rel=0.05)
    high = (dues % 10 < 1) | (dues % 10 > 9)
    low = (dues % 10 > 4) & (dues % 10 < 6)
    assert high.sum() / low.sum() == pytest.approx(60 / 20, rel=0.15)


def test_scenarios_of_a_tide_come_mixed_and_share_prefixes_within() -> None:
    chains = tidal(random.Random(0), loads.tides(0.7, 10.0), 60.0, Limits(0.005))
    asks = [one for chain in chains for one in chain]
    assert [one.due for one in asks] == sorted(one.due for one in asks)
    assert {one.scenario for one in asks} == set(servers.SCENARIOS)
    hits = [one for one in asks if one.prefix is not None]
    assert len(hits) / len(asks) == pytest.approx(0.7, abs=0.05)
    assert all(one.shared < one.tokens and one.shared % 32 == 0 for one in hits)


def test_a_prompt_is_as_long_as_said_and_begins_with_its_prefix() -> None:
    a = Ask(0, 300, 1, 1, "chat", 7, 256)
    b = Ask(0, 400, 1, 2, "chat", 7, 256)
    other = Ask(0, 400, 1, 3, "documents", 7, 256)
    texts = [client.prompt(one) for one in (a, b, other)]
    assert [len(text) // 4 for text in texts] == [300, 400, 400]
    assert texts[0][:1024] == texts[1][:1024] != texts[2][:1024]
    assert texts[0][1024:1100] != texts[1][1024:1100]
    assert client.prompt(a) == texts[0], "the same in every run"


# ---------------------------------------------------------------------------------- ideal scheduler


def test_ideal_one_prefill_serves_in_order() -> None:
    found = ideal([[ask(0.0)], [ask(0.05)], [ask(0.5)]], 1)
    assert firsts(found) == [0.1, 0.2, 0.6]
    assert found[0].ended == pytest.approx(0.1 + 0.03), "four tokens at 10 ms"


def test_ideal_paper_example_the_long_one_alone_the_short_ones_together() -> None:
    """Two prefills are idle; 8k, 2k, 2k, 2k tokens arrive at once, with 0.1k and 1k cached."""
    long = ask(0.0, 8000, prefix=0, shared=100)
    short = [ask(0.0, 2000, prefix=1, shared=1000) for _ in range(3)]
    assert firsts(ideal([[one] for one in (long, *short)], 2)) == [0.79, 0.1, 0.2, 0.3]


def test_ideal_begins_nothing_in_vain() -> None:
    """The third could begin before its limit, but not end, so the fourth, with time, goes first."""
    found = ideal([[ask(0.0)], [ask(0.0)], [ask(0.0, limit_s=0.19)], [ask(0.15)]], 1)
    assert firsts(found) == [0.1, 0.2, None, 0.3]
    assert found[2].ended == pytest.approx(0.09), "it leaves when it is too late to begin"
    assert not found[2].good


def test_ideal_begins_what_ends_at_its_limit() -> None:
    tokens = 10_000  # 1 s, which is exact in binary fractions
    found = ideal([[ask(0.0, tokens)], [ask(0.0, tokens, limit_s=2.0)]], 1)
    assert firsts(found) == [1.0, 2.0]
    assert found[1].good


def test_ideal_by_limit_lets_the_urgent_go_first() -> None:
    chains = [[ask(0.0)], [ask(0.01, limit_s=9.0)], [ask(0.02, limit_s=1.0)]]
    assert firsts(ideal(chains, 1)) == [0.1, 0.2, 0.3]
    assert firsts(ideal(chains, 1, by_limit=True)) == [0.1, 0.3, 0.2]


def test_ideal_a_user_asks_again_when_answered_or_refused() -> None:
    patient = [ask(0.0), ask(0.0)]
    hasty = [ask(0.0, limit_s=0.15), ask(0.0)]
    found = ideal([patient, hasty], 1)
    # The first is answered until 0.13; the other gives up at 0.05 and sends another request.
    assert [(round(one.due, 6), one.first is None) for one in found] == [
        (0.0, False),
        (0.0, True),
        (0.05, False),
        (0.13, False),
    ]
    assert firsts(found) == [0.1, None, 0.2, 0.3]


def test_ideal_asks_nothing_after_the_end() -> None:
    found = ideal([[ask(0.0) for _ in range(100)]], 1, until=0.5)
    assert max(one.due for one in found) < 0.5
    assert len(found) == 4


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), prefills=st.integers(1, 4), by_limit=st.booleans())
def test_ideal_leaves_no_prefill_idle_and_computes_nothing_in_vain(
    seed: int, prefills: int, by_limit: bool
) -> None:
    rng = random.Random(seed)
    lengths = rng.choices((100, 500, 1000, 4000), k=80)
    chains = poisson(rng, capacity(lengths, prefills) * rng.uniform(0.3, 2), lengths, Limits(0.0))
    found = ideal(chains, prefills, by_limit=by_limit)
    assert len(found) == 80
    assert all(one.good or one.refused for one in found)
    assert max(idle_s(found, prefills), default=0.0) < 1e-6
    steps = sorted(
        step
        for one in found
        if one.first is not None
        for step in ((one.first - one.prefill_s + 1e-9, 1), (one.first, -1))
    )
    assert max(itertools.accumulate(change for _, change in steps)) <= prefills


@pytest.mark.parametrize(("percent", "share"), [(80, 0.96), (100, 0.88)])
def test_ideal_of_two_servers_of_fixed_time(percent: int, share: float) -> None:
    """Design section 8: the budgets are compared with these values."""
    found = [
        good(ideal(poisson(random.Random(seed), percent / 5, [1000] * 2000, Limits(0.0)), 2))
        for seed in range(5)
    ]
    assert statistics.fmean(found) == pytest.approx(share, abs=0.03)


# ------------------------------------------------------------------------------------------ samples


def test_good_is_an_answer_within_the_limit() -> None:
    limited = ask(0.0, limit_s=0.25)
    assert Sample(limited, 1.0, 1.25).good
    assert not Sample(limited, 1.0, 1.26).good
    assert not Sample(limited, 1.0, 1.1, error="INTERNAL: lost").good
    assert not Sample(limited, 1.0).good


def test_what_was_refused_is_not_what_was_late() -> None:
    late, refused = Sample(ask(0.0), 0.0, error=LATE), Sample(ask(0.0), 0.0, error=REFUSED)
    answered = [Sample(ask(0.0), 0.0, 0.1) for _ in range(2)]
    assert (late.refused, refused.refused) == (False, True)
    assert good([*answered, late, refused]) == 0.5
    assert kept([*answered, late, refused]) == pytest.approx(2 / 3)
    assert kept([refused]) == 1.0


def test_percentiles_are_of_first_tokens() -> None:
    some = [Sample(ask(0.0), 1.0, 1.1), Sample(ask(0.0), 1.0, 1.3), Sample(ask(0.0), 1.0)]
    assert ttft_ms(some) == Percentiles(200.0, 280.0, 298.0)
    assert ttft_ms([Sample(ask(0.0), 1.0)]) is None


def test_idle_while_somebody_waits_in_vain_is_found() -> None:
    """Two prefills: one computes from 0 to 1, the other from 0 to 0.4 and from 0.6 to 1."""
    busy = [
        Sample(ask(0.0), 0.0, 1.0, prefill_s=1.0),
        Sample(ask(0.0), 0.0, 0.4, prefill_s=0.4),
        Sample(ask(0.0), 0.0, 1.0, prefill_s=0.4),
    ]

    def refused(due: float, ended: float) -> Sample:
        return Sample(ask(0.0), due, ended=ended, error=REFUSED)

    assert idle_s([*busy, refused(0.1, 0.9)], 2) == pytest.approx([0.2])
    assert idle_s([*busy, refused(0.5, 0.9)], 2) == pytest.approx([0.1])
    assert max(*idle_s([*busy, refused(0.1, 0.4)], 2), 0.0) == pytest.approx(0.0)
    assert idle_s([*busy, refused(0.7, 1.5)], 2) == pytest.approx([0.5])
    assert idle_s(busy, 2) == []


def test_a_forward_in_vain_is_no_idleness() -> None:
    """An answer that came too late was being computed until the moment of its error."""
    late = Sample(ask(0.0, 4000), 0.0, ended=1.0, error=LATE)
    assert late.forward == pytest.approx((0.6, 1.0))
    waited = Sample(ask(0.0), 0.6, ended=1.0, error=REFUSED)
    assert idle_s([late, waited], 1) == pytest.approx([0.0])
    offered = Sample(ask(0.0), 0.0, ended=0.3, error="UNAVAILABLE: no answer of prefill_0 within")
    assert offered.refused
    assert offered.forward == pytest.approx((0.3, 0.4))


# ------------------------------------------------------------------------------------------- points


def load(chains: int = 4, **fields: object) -> Load:
    return Load("poisson", 80, [[ask(float(n))] for n in range(chains)], **fields)  # type: ignore[arg-type]


def test_a_point_counts_offers_by_request_and_rejections_by_accepted() -> None:
    some = [Sample(ask(0.0, limit_s=0.3), float(n), n + 0.1) for n in range(4)]
    made = point(load(), "pool", "on_demand", some, Offers(10, 6))
    assert (made.offers, made.rejections) == (2.5, 1.5)
    assert (made.good, made.good_per_s, made.failed) == (1.0, round(4 / 3, 2), 0)
    assert point(load(), "pool", "ideal", some, None).offers is None


def test_a_point_leaves_out_the_beginning_and_counts_failures() -> None:
    some = [
        Sample(ask(0.0), 0.0),
        Sample(ask(0.0), 2.0, 2.1),
        Sample(ask(0.0), 2.5, error=REFUSED),
        Sample(ask(0.0), 2.6, error="INTERNAL: decode_0"),
    ]
    made = point(load(settle_s=1.0), "pool", "on_demand", some, None)
    assert (made.requests, made.failed) == (3, 1)
    assert made.good == pytest.approx(1 / 3, abs=1e-4)


def test_a_point_tells_scenarios_and_gateways_apart() -> None:
    some = [
        Sample(Ask(0.0, 10, 1.0, 0, "chat"), 0.0, 0.1, gateway=0),
        Sample(Ask(0.0, 10, 1.0, 0, "chat"), 0.0, 0.1, gateway=0),
        Sample(Ask(0.0, 10, 1.0, 0, "documents"), 0.0, 0.1, gateway=1),
        Sample(Ask(0.0, 10, 1.0, 0, "documents"), 0.0, error=REFUSED, gateway=1),
    ]
    made = point(load(), "pool", "on_demand", some, None)
    assert made.scenarios == {"chat": 1.0, "documents": 0.5}
    assert made.worst_gateway == pytest.approx(0.5 / 0.75, abs=1e-4)


def test_spread_is_that_of_each_prefill() -> None:
    def forward(prefill: str, seconds: float) -> Sample:
        return Sample(ask(0.0), 0.0, 1.0, prefill=prefill, prefill_s=seconds)

    apart = [forward("a", 0.1), forward("a", 0.1), forward("b", 0.8), forward("b", 0.8)]
    mixed = [forward("a", 0.1), forward("a", 0.8), forward("b", 0.1), forward("b", 0.8)]
    assert spread(apart) == pytest.approx(1.0)
    assert spread(mixed) > 3
    assert spread([]) == 1.0


def test_the_level_of_a_share_lies_between_those_measured() -> None:
    falling = [(8.0, 1.0), (10.0, 0.8), (12.0, 0.4), (14.0, 0.5)]
    assert crossing(falling, 0.6) == pytest.approx(11.0)
    assert crossing(falling, 0.1) is None
    assert between([(8.0, 1.0), (12.0, 0.6)], 11.0) == pytest.approx(0.7)


# --------------------------------------------------------------------------------- loads and report


def test_a_full_run_is_long_enough_and_not_too_long() -> None:
    wanted = list(loads.all_of(loads.FULL, 0.005, None))
    poissons = [one for one in wanted if one.part == "poisson"]
    assert [one.level for one in poissons] == [50, 80, 100, 120, 150]
    assert all(len(one.chains) >= 400 for one in poissons)
    assert all(set(one.policies) == set(servers.POLICIES) for one in poissons)
    seconds = sum(one.seconds * len(one.policies) * len(one.layouts) for one in wanted)
    assert seconds < 18 * 60
    quick = loads.all_of(loads.QUICK, 0.005, None)
    assert sum(one.seconds * len(one.policies) * len(one.layouts) for one in quick) < 90


def test_traces_are_read_by_path_and_left_out_without(tmp_path: Path) -> None:
    for file in loads.TRACES.values():
        (tmp_path / file).write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,374,44\n2023-11-16,4808,10\n"
        )
    parts = {one.part: one for one in loads.all_of(loads.FULL, 0.005, tmp_path)}
    lengths = {chain[0].tokens for chain in parts["code"].chains}
    assert lengths == {374, 4808}
    assert parts["code"].policies == ["on_demand", "round_robin", "shortest_queue"]
    assert not set(loads.TRACES) & {one.part for one in loads.all_of(loads.FULL, 0.005, None)}


def test_every_deployment_has_the_same_instances() -> None:
    for layout in ("pool", "groups", "gateways"):
        made = servers.deployment(layout)
        assert list(made.instances("prefill")) == ["prefill_0", "prefill_1"]
        assert list(made.instances("decode")) == ["decode_0", "decode_1"]
        assert made.prefill.batch == 1
    groups = servers.deployment("groups").served
    assert [scenario.name for scenario in groups] == list(servers.SCENARIOS)
    gateways = servers.deployment("gateways").servers
    assert sum(one.gateway for one in gateways) == servers.GATEWAYS


def _points() -> list[Point]:
    """Return the points of a run whose servers equal the ideal or, if old, reach half of it."""
    made = []
    for one in loads.all_of(loads.QUICK, 0.005, None):
        for layout in one.layouts:
            for policy in ("ideal", "ideal by limit", *one.policies):
                found = ideal(one.chains, 2, one.until)
                made.append(point(one, layout, policy, found, Offers(300, 100)))
                if policy == "fewest_streams":
                    made[-1].good = 0.9 if one.level == 8 else 0.3
    return made


def test_promises_are_met_by_the_ideal() -> None:
    made = {one.what: one for one in report.limits(_points())}
    for percent in (80, 150):
        assert made[f"{percent} %: within limit, of the ideal"].measured == 1.0
    assert made["errors that are no refusals"].measured == 0
    assert made["users at which fewest_streams has 57%"].measured == pytest.approx(11.3)
    ahead = made["there, on_demand is ahead by"]
    assert ahead.measured == made["there, ideal is ahead by"].measured > 0
    assert made["tide: pool, T_p p90/p10"].measured > 2
    unmet = [one.what for one in made.values() if one.met(one.limit) is False]
    assert unmet in ([], ["4 gateways: the worst, by the mean"])


def test_a_part_alone_promises_what_it_can() -> None:
    some = _points()
    parts = {one.part for one in some}
    assert parts == set(loads.PARTS) - set(loads.TRACES)
    for part in parts:
        told = report.limits([one for one in some if one.part == part])
        assert told[-1].what == "errors that are no refusals"
        assert len(told) > 1


def test_a_missed_promise_shows() -> None:
    some = _points()
    for one in some:
        if (one.part, one.policy, one.level) == ("poisson", "on_demand", 150):
            one.good, one.kept, one.idle = 0.9 * one.good, 0.9, 3
    missed = {one.what for one in report.limits(some) if one.met(one.limit) is False}
    assert missed >= {
        "150 %: within limit, of the ideal",
        "accepted and within limit, worst load",
        f"refused while a prefill was idle for {points.IDLE_S * 1e3:g} ms",
    }


def test_the_table_has_a_row_for_each_point() -> None:
    some = _points()
    assert report.table(some).row_count == len(some)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report.plot(_points(), tmp_path / "scheduling.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------- many instances in one process


def test_a_crowd_serves_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "WAITING_S", 0.002)
    few = asyncio.run(crowd._cost(2, 4))
    many = asyncio.run(crowd._cost(8, 16))
    assert (few.instances, many.instances) == (2, 8)
    assert min(few.idle, few.waiting, many.idle, many.waiting) > 0


def test_what_a_crowd_adds_is_the_difference() -> None:
    few, many = crowd.Cost(2, 0.1, 0.5), crowd.Cost(200, 1.2, 0.9)
    idle, waiting = crowd.limits([few, many])
    assert (idle.measured, waiting.measured) == (1.1, 0.4)
    assert (idle.met(idle.limit), waiting.met(waiting.limit)) == (False, True)
