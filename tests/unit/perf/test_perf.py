"""Tests for the statistics that benchmarks compute from the times they have measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from perf import load, record
from perf.answers import Answer, summarize
from perf.budgets import Budget
from perf.load import levels
from perf.processes import Usage
from perf.soak import Snapshot, growth
from typer.testing import CliRunner


def test_times_of_one_answer() -> None:
    answer = Answer(10.0, [10.5, 10.6, 11.5], tokens=11)
    assert answer.ttft == pytest.approx(0.5)
    assert answer.e2e == pytest.approx(1.5)
    assert answer.gaps == pytest.approx([0.1, 0.9])
    assert answer.itl == pytest.approx([0.1]), "per token, not per response"


@pytest.mark.parametrize(("responses", "tokens"), [([1.0], 5), ([1.0, 2.0], 1)])
def test_an_answer_without_time_per_token(responses: list[float], tokens: int) -> None:
    assert Answer(0.0, responses, tokens).itl == []


def test_many_answers() -> None:
    answers = [Answer(float(n), [n + 0.1, n + 1.0], tokens=10) for n in range(10)]
    summary = summarize(answers)
    assert (summary.requests, summary.requests_per_s, summary.tokens_per_s) == (10, 1.0, 10.0)
    assert summary.responses_per_s == 2.0
    assert summary.ttft_ms.p50 == summary.ttft_ms.p99 == pytest.approx(100)
    assert summary.itl_ms is not None
    assert summary.itl_ms.p50 == pytest.approx(100)
    assert summary.gap_ms is not None
    assert summary.gap_ms.p99 == pytest.approx(900)


def test_single_responses_have_no_gaps() -> None:
    summary = summarize([Answer(0.0, [1.0], 16), Answer(0.5, [2.0], 16)])
    assert summary.itl_ms is None
    assert summary.gap_ms is None
    assert summary.tokens_per_s == 16


@pytest.mark.parametrize(
    ("measured", "bound", "met"),
    [
        (4.0, "at most", True),
        (4.01, "at most", False),
        (4.0, "at least", True),
        (3.9, "at least", False),
    ],
)
def test_a_budget_is_met_at_its_limit(measured: float, bound: str, met: bool) -> None:
    budget = Budget("TTFT", measured, "ms", bound, 4.0)  # type: ignore[arg-type]
    assert budget.met(budget.limit) is met
    assert budget.met(budget.moonshot) is None, "there is no target"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:9:4", [1, 5, 9]),
        ("8:8:1", [8]),
        ("8", [8]),
        ("1:4:2", [1, 3]),
        ("0.5:1:0.25", [0.5, 0.75, 1]),
    ],
)
def test_levels_of_load(text: str, expected: list[float]) -> None:
    assert levels(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:0", "0:4:1", "-1", "4:1:1", "1:2:3:4"])
def test_invalid_levels(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="from:to:step is allowed"):
        levels(text)


def test_growth_is_that_of_each_process_and_of_shared_memory() -> None:
    before = Snapshot(1, {"decode": Usage(1000, 800, 10), "prefill": Usage(500, 400, 0)}, 2000)
    after = Snapshot(2, {"decode": Usage(1100, 800, 9), "prefill": Usage(500, 400, 1)}, 2020)
    grown = {one.what.split(":")[0]: one.measured for one in growth(before, after)}
    assert grown == {
        "/dev/shm KiB": 1.0,
        "decode RSS KiB": 10.0,
        "decode PSS KiB": 0.0,
        "decode descriptors": -10.0,
        "prefill RSS KiB": 0.0,
        "prefill PSS KiB": 0.0,
        "prefill descriptors": 100.0,
    }


@pytest.mark.parametrize(("options", "name"), [([], "load-part.json"), (["--keep"], "load.json")])
def test_a_run_by_hand_leaves_the_kept_results_alone(
    options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(load, "measure", lambda *_: [])
    app = typer.Typer()
    app.command()(load.main)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert [file.name for file in tmp_path.iterdir()] == [name]
