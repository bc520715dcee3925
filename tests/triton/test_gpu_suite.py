"""Tests that the parts of the GPU suite run, in the smallest size and on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from perf.gpu import engine, exact, faults, report, server, serving, transfer
from perf.gpu.outcome import Outcome, finished
from perf.gpu.scale import SMALLEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server.serving(SMALLEST, SMALLEST.small, each=1, baseline=True) as started:
        yield started


def made(part: str, folder: Path) -> Outcome:
    return Outcome(part, SMALLEST.name, "bench", folder)


def test_transfers_arrive_right_and_are_measured(tmp_path: Path) -> None:
    outcome = made("transfer", tmp_path)
    transfer.run(outcome, SMALLEST)
    assert outcome.end()
    assert finished("transfer", SMALLEST.name, "test", tmp_path)
    (table,) = outcome.results.tables
    assert {"copy", "handed over", "fused scatter", "a handshake per block"} <= set(table.columns)
    assert len(table.rows) == len(transfer.MEASURED)
    assert "CUDA IPC" in outcome.results.not_shown[0]
    assert "## transfer: done" in report.write(tmp_path, ["transfer"]).read_text()


def test_engine_steps_are_compared_with_the_machine(tmp_path: Path) -> None:
    outcome = made("engine", tmp_path)
    engine.run(outcome, SMALLEST)
    assert outcome.end()
    steps, profile = outcome.results.tables
    assert len(steps.rows) == len(SMALLEST.steps.prompts) + len(SMALLEST.steps.batches)
    assert all(float(row[1]) > 0 and float(row[2]) >= 0 for row in steps.rows)
    assert len(profile.rows) > 1


def test_tokens_are_those_of_one_model(tmp_path: Path, running: Running) -> None:
    outcome = made("exact", tmp_path)
    exact.run(outcome, SMALLEST, running)
    assert outcome.end(), outcome.results.failures
    assert [target.measured for target in outcome.results.targets] == [100.0, 100.0]


def test_serving_is_measured_apart_and_together(tmp_path: Path, running: Running) -> None:
    outcome = made("serving", tmp_path)
    serving.run(outcome, SMALLEST, running)
    assert outcome.end()
    (table,) = outcome.results.tables
    assert [row[0] for row in table.rows] == ["pdserve"] * 3 + ["aggregated"] * 3


def test_faults_end_requests_once(tmp_path: Path, running: Running) -> None:
    outcome = made("faults", tmp_path)
    faults.run(outcome, SMALLEST, running)
    assert outcome.end(), outcome.results.failures
    for fault in ("prefill killed", "decode killed", "context lost"):
        assert outcome.results.data[fault]["being answered when it struck"] > 0
    # There is one decode: it was the one that answered.
    killed = outcome.results.data["decode killed"]
    assert killed["failed"] + killed["more than one attempt"] > 0
