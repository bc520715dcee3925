"""Tests for how the GPU suite runs its parts, and for what it keeps of each."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from perf.budgets import Budget
from perf.gpu import __main__ as suite
from perf.gpu import report, roofline
from perf.gpu.model import SHAPES
from perf.gpu.outcome import Outcome, Rows, finished, read
from perf.gpu.parts import PARTS
from perf.gpu.roofline import Rates
from perf.gpu.scale import CPU, GPU, SMALLEST, Scale
from perf.gpu.transfer import MEASURED, Point, targets

from pdctl.paths import ROOT
from pdserve.transfer.protocol import Unreachable

Suite = Callable[..., int]


def made(part: str, folder: Path, kind: str = "bench") -> Outcome:
    return Outcome(part, SMALLEST.name, kind, folder)


def test_a_part_with_anything_wrong_has_failed(tmp_path: Path) -> None:
    outcome = made("exact", tmp_path)
    outcome.check("nothing", [])
    outcome.check("tokens", ["7 of 8 tokens"])
    assert not outcome.end()
    assert not finished("exact", SMALLEST.name, "bench", tmp_path)
    found = read("exact", tmp_path)
    assert found is not None
    assert found.results.failures == ["tokens: 1 wrong: 7 of 8 tokens"]


def test_a_part_that_was_interrupted_is_old_or_of_another_size_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = made("engine", tmp_path)
    assert not finished("engine", SMALLEST.name, "bench", tmp_path)
    assert outcome.end()
    assert finished("engine", SMALLEST.name, "bench", tmp_path)
    assert not finished("engine", GPU.name, "bench", tmp_path)
    later = time.time() + 24 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert not finished("engine", SMALLEST.name, "bench", tmp_path)


def test_what_was_measured_need_not_be_tested_but_the_reverse(tmp_path: Path) -> None:
    made("transfer", tmp_path, "test").end()
    assert finished("transfer", SMALLEST.name, "test", tmp_path)
    assert not finished("transfer", SMALLEST.name, "bench", tmp_path)
    made("transfer", tmp_path, "bench").end()
    assert finished("transfer", SMALLEST.name, "test", tmp_path)


def test_the_report_has_every_target_and_failure(tmp_path: Path) -> None:
    outcome = made("transfer", tmp_path)
    outcome.target(Budget("pull", 0.5, "", "at least", 0.8))
    outcome.target(Budget("copy", 2.0, "ms", "at most", None))
    outcome.not_shown("NIXL")
    outcome.table(Rows("Times", ["layout", "ms"], [["8B", "1.5"]]))
    outcome.table(Rows("Times", ["layout", "ms"], [["8B", "1.6"]]))
    outcome.end("RuntimeError('x')")
    text = report.write(tmp_path, ["transfer", "exact"]).read_text()
    assert "| pull | 0.5  | at least 0.8 | missed |" in text
    assert "| copy | 2 ms | - |  |" in text
    assert "- **failed**: RuntimeError('x')" in text
    assert "- not shown: NIXL" in text
    assert "| 8B | 1.6 |" in text
    assert "1.5" not in text
    assert "transfer: failed" in text
    assert "exact" not in text


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """Return the suite's `main` on a machine without a GPU; results go to a folder of the test."""

    def no_gpu() -> None:
        raise Unreachable("no GPU is visible")

    monkeypatch.setattr(suite, "load", no_gpu)
    monkeypatch.setattr(suite, "SCRATCH", tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["perf.gpu", *arguments])
        return suite.main()

    return call


def test_a_part_that_fails_does_not_stop_the_others(
    run_suite: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(part: str, scale: Scale, folder: Path, *_: object) -> bool:
        ran.append(part)
        return Outcome(part, scale.name, "test", folder).end("x" if part == "transfer" else "")

    monkeypatch.setattr(suite, "run", run)
    assert run_suite("test") == 1
    assert ran == [name for name, part in PARTS.items() if part.checks]
    said = capsys.readouterr().out
    assert "failed: transfer\n" in said
    assert "Not shown, for there is no GPU (no GPU is visible)" in said


def test_a_part_that_is_done_is_skipped_unless_asked_for(
    run_suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def run(part: str, scale: Scale, folder: Path, *_: object) -> bool:
        ran.append(part)
        return Outcome(part, scale.name, "bench", folder).end()

    monkeypatch.setattr(suite, "run", run)
    asked = ("bench", "--part", "engine")
    assert run_suite(*asked) == 0
    assert run_suite(*asked) == 0
    assert ran == ["engine"]
    # Results that are expected elsewhere than those of the first run are found, and put there.
    out = tmp_path / "out"
    assert run_suite(*asked, "--out", str(out)) == 0
    assert ran == ["engine"]
    assert finished("engine", CPU.name, "bench", out)
    assert run_suite(*asked, "--again") == 0
    assert ran == ["engine", "engine"]


def test_a_part_has_a_limit_of_time(tmp_path: Path) -> None:
    made("transfer", tmp_path)
    began = time.monotonic()
    assert not suite.run("transfer", SMALLEST, tmp_path, "bench", 0.01)
    assert time.monotonic() - began < suite.END_S
    found = read("transfer", tmp_path)
    assert found is not None
    assert found.results.state == "failed"
    assert found.results.failures == ["it was ended after 0.01 s"]


def test_all_limits_together_are_those_of_the_suite() -> None:
    assert all(part.limit_s <= 480 for part in PARTS.values())
    assert all(part.checks or part.measures for part in PARTS.values())


def test_unknown_parts_are_refused_with_those_there_are() -> None:
    command = [sys.executable, "-m", "perf.gpu", "test", "--part", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "transfer" in done.stderr


def test_an_8b_model_has_8_billion_weights() -> None:
    shape = SHAPES["8b"]
    embedding = shape.vocabulary * shape.hidden
    assert (shape.weights + embedding) / 1e9 == pytest.approx(8.03, abs=0.01)


def test_the_least_time_of_a_step_is_its_bytes_over_the_rate() -> None:
    rates = Rates(bytes_per_s=4e12, flop_per_s=8e14)
    # 15.0 GB of weights, and 128 KiB of each of 65,536 tokens.
    step = roofline.step_s(rates, SHAPES["8b"], 2, 64, 1024)
    assert step == pytest.approx((15.0e9 + 64 * 1024 * 131072) / 4e12, rel=0.01)
    # 6.98 billion weights of the layers, and attention over half of 4096 x 4096.
    prompt = roofline.prompt_s(rates, SHAPES["8b"], 4096)
    attention = 2 * 2 * 32 * 32 * 128 * 4096 * 4096 / 2
    assert prompt == pytest.approx((2 * 6.98e9 * 4096 + attention) / 8e14, rel=0.01)


def test_targets_are_of_large_kv_caches_and_of_a_gpu() -> None:
    ways = {"copy": 0.1, "pull": 0.11, "fused scatter": 0.2, "handed over": 0.9}
    points = [
        Point(MEASURED[0], 128, 16.0, {**ways, "pull": 9.0}),
        Point(MEASURED[0], 4096, 512.0, ways),
    ]
    pull, scatter, whole = targets(points, gpu=True)
    assert (pull.measured, pull.met(pull.limit)) == (0.909, True)
    assert (scatter.measured, scatter.met(scatter.limit)) == (0.5, False)
    assert (whole.what, whole.met(whole.limit)) == ("512 MiB handed over", True)
    assert [one.limit for one in targets(points, gpu=False)][:2] == [None, None]
