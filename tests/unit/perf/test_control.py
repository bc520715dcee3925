"""Tests for the benchmark of the ratio controller: its traffic, its clock, and its statistics."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from perf.benchmarks_page import control, result
from perf.control import __main__ as command
from perf.control import controlled, mixes, points, report, servers, traffic
from perf.control.hurried import Clock, Loop
from perf.control.points import CONTROLLER, Change, Point, Used
from perf.control.traffic import SCALE, SETTLE_S, TTFT_LIMIT_S, WINDOW_S
from perf.scheduling.samples import Sample
from perf.scheduling.workload import Ask
from perf.serving import PROFILES

from pdserve.config import checks
from pdserve.control.events import Event, What
from pdserve.engines.emulated import Profile
from tests.servers import on_free_ports

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

REFUSED = "UNAVAILABLE: no idle prefill within the TTFT limit of 995 ms (995 ms waited)"

# -------------------------------------------------------------------------------- mixes and traffic


def test_the_times_are_those_of_the_profile() -> None:
    profile = msgspec.yaml.decode((PROFILES / "control.yaml").read_bytes(), type=Profile)
    assert profile.prefill.tokens_ms(1000) == pytest.approx(1000 * mixes.PROMPT_TOKEN_S * 1e3)
    decode = profile.decode
    step_ms = decode.base_ms + mixes.SLOTS * decode.per_sequence_ms
    assert step_ms == pytest.approx(mixes.FULL_STEP_S * 1e3)
    longest = traffic.LONGEST * max(mixes.A.prompt + mixes.A.answer, mixes.B.prompt)
    assert longest + traffic.LONGEST * mixes.B.answer < profile.context_length
    assert servers.deployment(4).decode.slots == mixes.SLOTS


def test_the_best_ratios_lie_apart_by_at_most_four_instances() -> None:
    weights = (0, 0.25, 0.5, 0.75, 1)
    assert [mixes.best(weight) for weight in weights] == [6, 5, 4, 3, 2]
    for weight in weights:
        assert mixes.capacity(mixes.best(weight), weight) == pytest.approx(36, rel=0.02)
        others = [mixes.capacity(n, weight) for n in command.EVERY if n != mixes.best(weight)]
        assert max(others) < 0.85 * mixes.capacity(mixes.best(weight), weight)


def test_the_rate_is_below_what_the_best_ratio_serves_of_any_mix() -> None:
    rate = traffic.stationary(600, (4,)).rate
    worst = min(mixes.capacity(mixes.best(n / 40), n / 40) for n in range(41))
    assert 0.8 * worst < rate < 0.95 * worst, "above, a best ratio would not be enough"


def test_every_setting_gets_the_same_requests_and_every_repeat_others() -> None:
    tide = traffic.tide(600, (4,))
    assert tide.chains(1) == tide.chains(1)
    assert tide.chains(1) != tide.chains(2)


def test_requests_are_as_many_and_as_long_as_the_mix_says() -> None:
    made = traffic.stationary(20_000, (4,))
    asks = [ask for chain in made.chains(0) for ask in chain]
    assert len(asks) / (made.seconds + SETTLE_S) == pytest.approx(made.rate, rel=0.03)
    work_s = statistics.fmean(ask.tokens * mixes.PROMPT_TOKEN_S for ask in asks)
    assert 1 / work_s == pytest.approx(mixes.rates(0.5)[0], rel=0.03)
    steps = statistics.fmean(ask.outputs - 1 for ask in asks)
    assert mixes.SLOTS / (steps * mixes.FULL_STEP_S) == pytest.approx(mixes.rates(0.5)[1], rel=0.03)
    assert all(ask.limit_s == TTFT_LIMIT_S and ask.outputs >= 2 for ask in asks)
    dues = [ask.due for ask in asks]
    assert dues == sorted(dues)


def test_the_tide_passes_each_mix_and_dwells_at_the_pure_ones() -> None:
    tide = traffic.tide(600, (4,))
    assert tide.seconds == 600 / SCALE
    weights = [tide.weight(tide.seconds * n / 1000) for n in range(1001)]
    assert weights[0] == pytest.approx(0.5) == weights[-1]
    assert tide.weight(-5.0) == pytest.approx(0.5), "what is not counted is half of each"
    assert statistics.fmean(weights) == pytest.approx(0.5, abs=1e-3)
    for pure in (0.0, 1.0):
        assert weights.count(pure) / 1000 == pytest.approx(1 / 6, abs=0.01)
    assert max(abs(b - a) for a, b in itertools.pairwise(weights)) < 0.01


def test_the_step_changes_the_best_ratio_by_two_instances() -> None:
    step = traffic.step(300)
    came = traffic.STEP_SCALED_S / SCALE
    assert (step.weight(came - 0.01), step.weight(came)) == (0.5, 1.0)
    assert step.seconds == pytest.approx(came + 300 / SCALE)
    assert step.prefills == (4, 2)


def test_the_square_wave_is_shorter_than_the_window() -> None:
    square = traffic.square(600)
    weights = [square.weight(WINDOW_S * (n + 0.5) / 120) for n in range(120)]
    assert set(weights) == {0.0, 1.0}
    assert statistics.fmean(weights) == pytest.approx(0.5)
    assert sum(a != b for a, b in itertools.pairwise(weights)) >= 5
    period = traffic.SQUARE_SCALED_S / SCALE
    assert square.weight(-0.25 * period) == 1.0, "it goes on before the time that is counted"


def test_instances_are_spread_over_both_servers() -> None:
    for prefills in command.EVERY:
        made = servers.deployment(prefills)
        assert list(checks.problems(on_free_ports(made))) == []
        assert len(made.instances("prefill")) == prefills
        assert len(made.instances("decode")) == mixes.INSTANCES - prefills
        assert len(made.servers) == 2
        assert all(server.gateway for server in made.servers)
        for role in ("prefill", "decode"):
            counts = [len(getattr(server, role)) for server in made.servers]
            assert max(counts) - min(counts) <= 1


# ---------------------------------------------------------------------------------------- the clock


def test_a_hurried_loop_passes_its_time_faster() -> None:
    loop = Loop(20.0)
    began, before = time.monotonic(), loop.time()
    loop.run_until_complete(asyncio.sleep(10.0))
    assert loop.time() - before >= 10.0
    loop.close()
    assert 0.5 <= time.monotonic() - began < 5.0


def test_a_hurried_limit_ends_earlier() -> None:
    async def waits() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 10.0)

    loop = Loop(20.0)
    began = time.monotonic()
    loop.run_until_complete(waits())
    loop.close()
    assert 0.5 <= time.monotonic() - began < 5.0


def test_a_hurried_clock_agrees_at_its_origin() -> None:
    origin = time.time() - 2.0
    clock = Clock(6.0, origin)
    assert clock() - origin == pytest.approx(12.0, abs=1.0)
    assert clock.real(origin + 60.0) == pytest.approx(origin + 10.0)


# ------------------------------------------------------------------------------------------- events


def event(at: float, what: What, text: str, *instances: str, **numbers: float) -> Event:
    return Event(at, what, "default", text, instances, numbers)


def test_changes_are_told_by_the_real_clock() -> None:
    told = [
        event(1060.0, "begin", "ratio: 4:4 to 2:6: more", "a", "b", prefills=4, target_prefills=2),
        event(1066.0, "step", "drain to change", "a", drain_s=3.0),
        event(1072.0, "end", "ratio: 2 of 2 done", "a", "b", seconds=12.0),
        event(1120.0, "begin", "ratio: 2:6 to 5:3: more", "a", "b", prefills=2, target_prefills=5),
    ]
    clock = Clock(6.0, 1000.0)
    assert controlled.changes(told, clock, 1002.0) == [
        Change(8.0, "2:6", 2.0),
        Change(18.0, "4:4", None),
    ], "one transaction moves two of eight"
    lines = controlled.texts(told, clock, 1002.0)
    assert lines[0].startswith("8.0 s: begin: ratio: 4:4 to 2:6: more (a, b, prefills 4")
    assert lines[1] == "9.0 s: step: drain to change (a, drain_s 3)"


def test_a_substitution_is_no_change_of_the_ratio() -> None:
    told = [event(0.0, "begin", "substitute: a is lost", "b"), event(1.0, "end", "substitute: 1")]
    assert controlled.changes(told, Clock(6.0, 0.0), 0.0) == []


# ------------------------------------------------------------------------------------------- points


def sample(due: float, ttft: float = 0.1, tpot: float = 0.03, error: str = "") -> Sample:
    ask = Ask(due, 100, TTFT_LIMIT_S, 0, outputs=11)
    if error:
        return Sample(ask, due, ended=due + 1.0, error=error)
    return Sample(ask, due, due + ttft, due + ttft + 10 * tpot)


def test_good_is_within_both_limits() -> None:
    assert points.good(sample(1.0))
    assert not points.good(sample(1.0, ttft=TTFT_LIMIT_S + 0.01))
    assert not points.good(sample(1.0, tpot=traffic.TPOT_LIMIT_S + 0.001))
    assert not points.good(sample(1.0, error=REFUSED))


def test_only_what_a_gateway_ends_for_its_limit_has_expired() -> None:
    assert points.expired(sample(1.0, error=REFUSED))
    assert not points.expired(sample(1.0, error="UNAVAILABLE: no prefill serves group default"))
    lost = "<AioRpcError of RPC that terminated with: status = StatusCode.UNAVAILABLE>"
    assert not points.expired(sample(1.0, error=lost))


def test_a_point_counts_misses_and_failures_apart() -> None:
    settled = [sample(SETTLE_S + 1), sample(SETTLE_S + 2, ttft=5.0)]
    errors = [sample(SETTLE_S + 3, error=REFUSED), sample(SETTLE_S + 4, error="INTERNAL: lost")]
    early = [sample(0.0, error=REFUSED)]
    one = traffic.stationary(60 * SCALE, (4,))
    made = points.point(one, "4:4", 0, [*early, *settled, *errors], (), (), Used(0.5, 0.1, 0.8))
    assert (made.requests, made.failed) == (4, 1)
    assert (made.good, made.late, made.expired) == (0.25, 0.25, 0.25)
    assert made.good_per_s == pytest.approx(1 / 60, abs=0.01)


def test_a_failure_before_the_counted_time_is_a_failure() -> None:
    some = [sample(0.0, error="INTERNAL: lost"), sample(SETTLE_S + 1)]
    made = points.point(traffic.stationary(600, (4,)), "4:4", 0, some, (), (), Used(0, 0, 0))
    assert (made.requests, made.good, made.failed) == (1, 1.0, 1)


def test_bins_are_by_when_a_request_was_sent() -> None:
    some = [
        sample(SETTLE_S),
        sample(SETTLE_S + 0.1, error=REFUSED),
        sample(SETTLE_S + 2.5 * points.BIN_S),
    ]
    assert points.bins(some, 3 * points.BIN_S) == [0.5, 1.0, 1.0]


def test_back_is_when_no_later_bin_is_bad() -> None:
    step = 2 * points.BIN_S
    assert points.back_s([1.0, 1.0, 0.2, 0.95, 0.5, 0.95], step) == pytest.approx(3 * points.BIN_S)
    assert points.back_s([1.0] * 6, step) == 0.0
    assert points.back_s([0.1, 1.0, 1.0], step) == 0.0


# ------------------------------------------------------------------------------------------- report


def made(traffic_name: str, setting: str, repeat: int, good: float, **fields: object) -> Point:
    bins = fields.pop("bins", [good] * 80)
    changes = fields.pop("changes", [])
    failed = fields.pop("failed", 0)
    return Point(
        traffic_name, setting, repeat, 1000, good, 30.0, 0.0, 0.0, failed, None, None,
        bins, changes, [], Used(0.5, 0.1, 0.7),
    )  # type: ignore[arg-type]  # fmt: skip


def told(some: Sequence[Point]) -> dict[str, tuple[float, bool | None]]:
    return {one.what: (one.measured, one.met(one.limit)) for one in report.limits(some)}


def test_stationary_compares_with_the_best_that_was_measured() -> None:
    rng = random.Random(0)
    some = []
    for repeat in range(3):
        noise = rng.uniform(-0.01, 0.01)
        some += [
            made("stationary", "4:4", repeat, 0.96 + noise),
            made("stationary", "3:5", repeat, 0.7 + noise),
            made("stationary", CONTROLLER, repeat, 0.95 + noise, changes=[Change(1.0, "3:5")]),
        ]
    found = told(some)
    measured, met = found["stationary: goodput, of the best fixed ratio's"]
    assert measured == pytest.approx(0.95 / 0.96, abs=0.001)
    assert met
    assert found["stationary: 4:4, the best by equation (1), behind the best fixed one"][1]
    # Three changes in three runs of 80 bins of a quarter of a minute.
    assert found["stationary: changes per scaled hour"] == (3.0, False)


def test_another_ratio_that_is_better_than_the_predicted_one_shows() -> None:
    some = [made("stationary", "4:4", 0, 0.8), made("stationary", "5:3", 0, 0.9)]
    assert told(some)["stationary: 4:4, the best by equation (1), behind the best fixed one"] == (
        pytest.approx(11.11, abs=0.01),
        False,
    )


def test_a_tide_has_a_lead_and_a_margin() -> None:
    some = []
    for repeat, ours in enumerate((0.93, 0.94, 0.95)):
        for setting, good in (("2:6", 0.6), ("4:4", 0.8), ("6:2", 0.5), ("5:3", 0.4)):
            some.append(made("tide", setting, repeat, good))
        some.append(made("tide", CONTROLLER, repeat, ours))
    found = told(some)
    assert found["tide: goodput, of the best fixed ratio's (4:4)"] == (
        pytest.approx(0.94 / 0.8, abs=0.001),
        True,
    )
    assert found["  lead, by the spread of the repeats"] == (pytest.approx(0.14 / 0.02, 0.3), True)
    measured, met = found["tide: goodput, of the worst chosen beforehand (6:2)"]
    assert measured == pytest.approx(1.88)
    assert met, "5:3 is worse, but nobody would have chosen it beforehand"


def test_a_lead_within_the_spread_is_missed() -> None:
    some = []
    for repeat, ours in enumerate((0.79, 0.81, 0.86)):
        some += [made("tide", "4:4", repeat, 0.8), made("tide", CONTROLLER, repeat, ours)]
    found = told(some)
    assert found["tide: goodput, of the best fixed ratio's (4:4)"][1]
    assert found["  lead, by the spread of the repeats"][1] is False


def test_a_step_counts_from_when_it_came() -> None:
    before = round(traffic.STEP_SCALED_S / SCALE / points.BIN_S)
    bins = [1.0] * before + [0.3] * 6 + [0.97] * 10
    some = [made("step", CONTROLLER, 0, 0.9, bins=bins), made("step", "4:4", 0, 0.5, bins=bins)]
    found = told(some)
    assert found["step: controller, back within the SLO, worst repeat"] == (1.5, True)
    assert found["step: 4:4, back within the SLO, worst repeat"] == (1.5, None)
    worse = made("step", CONTROLLER, 1, 0.9, bins=[1.0] * before + [0.3] * 9 + [0.97] * 7)
    late = told([*some, worse])
    assert late["step: controller, back within the SLO, worst repeat"] == (2.25, False)


def test_a_square_wave_that_is_followed_is_missed() -> None:
    some = [made("square", CONTROLLER, repeat, 0.9) for repeat in range(2)]
    assert told(some)["square wave: changes, all repeats"] == (0, True)
    some[0].changes.append(Change(3.0, "5:3"))
    assert told(some)["square wave: changes, all repeats"] == (1, False)


def test_failed_requests_are_missed_whatever_was_measured() -> None:
    assert told([made("tide", "4:4", 0, 0.9)]) == {"failed requests": (0, True)}
    assert told([made("step", "4:4", 0, 0.9, failed=2)])["failed requests"] == (2, False)


def test_the_table_and_the_picture_show_every_setting(tmp_path: Path) -> None:
    some = [
        made("tide", CONTROLLER, 0, 0.9, changes=[Change(5.0, "5:3", 0.4)]),
        made("tide", "4:4", 0, 0.8),
        made("square", "4:4", 0, 0.8),
    ]
    assert report.table(some).row_count == 3
    pytest.importorskip("matplotlib")
    assert report.plot(some, tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_has_every_fixed_ratio_of_the_tide() -> None:
    parts = {one.name: one for one in command.FULL}
    assert [mixes.ratio(n) for n in parts["tide"].prefills] == ["2:6", "3:5", "4:4", "5:3", "6:2"]
    quick = {one.name: one for one in command.QUICK}
    assert {mixes.ratio(n) for n in quick["tide"].prefills} == set(report.BEFOREHAND)
    assert quick.keys() == parts.keys()
    assert all(quick[name].seconds < one.seconds for name, one in parts.items())


# ----------------------------------------------------------------------------------------- the page


def test_the_page_shows_means_and_what_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = []
    for repeat, ours in enumerate((0.9, 0.92, 0.94)):
        change = Change(5.0, "5:3", 0.4)
        some.append(made("tide", CONTROLLER, repeat, ours, changes=[change]))
        some.append(made("tide", "4:4", repeat, 0.7))
    document = {"results": {"budgets": report.limits(some), "points": some}}
    (tmp_path / "control.json").write_bytes(msgspec.json.encode(document))
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    rows = control.goodput().splitlines()
    assert rows[2:] == [
        "| tide | **controller** | 92.0 % | 90.0 % to 94.0 % | 0.0 % | 0.0 % | 0 | 3 |",
        "| tide | 4:4 | 70.0 % | 70.0 % to 70.0 % | 0.0 % | 0.0 % | 0 | - |",
    ]
    targets = control.targets()
    assert "goodput, of the best fixed ratio's (4:4) | 1.31 x | at least 1 x: met |" in targets
    assert "of the worst chosen beforehand (4:4) | 1.31 x | at least 1.6 x: missed |" in targets
