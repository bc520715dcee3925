"""Tests for the clients of the benchmarks, with the real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from perf import client, perf_analyzer
from perf.client import Load
from perf.load import BASELINES
from perf.perf_analyzer import Workload
from perf.serving import deployment, serving

if TYPE_CHECKING:
    from perf.perf_analyzer import Kind

    from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


@pytest.mark.parametrize(
    ("model", "kind"),
    [("pdserve", "concurrency"), ("pdserve", "request-rate"), ("ensemble", "concurrency")],
)
def test_perf_analyzer_measures_every_request(
    emulated_server: Running, model: str, kind: Kind
) -> None:
    workload = Workload(requests=12, prompt_tokens=20, output_tokens=5)
    answers = perf_analyzer.run(emulated_server.grpc, model, workload, kind, 4)
    assert len(answers) >= 12
    assert {answer.tokens for answer in answers} == {5}
    assert all(answer.sent < answer.responses[0] <= answer.responses[-1] for answer in answers)


def test_perf_analyzer_that_fails_says_why(emulated_server: Running) -> None:
    with pytest.raises(perf_analyzer.Failed, match="no_such_model"):
        perf_analyzer.run(
            emulated_server.grpc, "no_such_model", Workload(1, 5, 5), "concurrency", 1
        )


@pytest.mark.parametrize("stream", [True, False])
def test_the_lean_client_measures_every_request(emulated_server: Running, stream: bool) -> None:
    load = Load(emulated_server.grpc, "pdserve", 3, 4, 20, 5, stream)
    measured = client.run(load)
    assert len(measured.answers) == 12
    assert {answer.tokens for answer in measured.answers} == {5}
    assert measured.client_cpu_s > 0
    if not stream:
        assert all(len(answer.responses) == 1 for answer in measured.answers)


def test_every_baseline_answers_as_pdserve_does() -> None:
    workload = Workload(requests=4, prompt_tokens=20, output_tokens=5)
    with serving(deployment("instant"), *BASELINES) as server:
        for model in ("pdserve", *BASELINES):
            answers = perf_analyzer.run(server.grpc, model, workload, "concurrency", 2)
            assert len(answers) >= 4
            assert {answer.tokens for answer in answers} == {5}, model
