"""Tests for the clients of the benchmarks, with the real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from perf import client, perf_analyzer
from perf.client import Load
from perf.load import BASELINES
from perf.perf_analyzer import Workload
from perf.serving import deployment, serving

from pdserve import connections

if TYPE_CHECKING:
    from pathlib import Path

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


@pytest.mark.full
@pytest.mark.skipif(shutil.which("genai-perf") is None, reason="no genai-perf on PATH")
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("model", ["ensemble", "pdserve"])
def test_genai_perf_measures_every_request(
    emulated_server: Running, tmp_path: Path, model: str, streaming: bool
) -> None:
    """It is no dependency, since it needs 0.9 GiB: ``pip install genai-perf==0.0.16`` elsewhere."""
    line = [
        *("genai-perf", "profile", "-m", model, "-u", emulated_server.grpc),
        *("--endpoint-type", "kserve", "--backend", "tensorrtllm"),
        *("--tokenizer", emulated_server.deployment.model, "--num-dataset-entries", "10"),
        *("--synthetic-input-tokens-mean", "30", "--output-tokens-mean", "16"),
        *("--concurrency", "2", "--request-count", "12", "--artifact-dir", str(tmp_path)),
        *(("--streaming",) if streaming else ()),
    ]
    path = f"{perf_analyzer.BUNDLED.parent}:{os.environ['PATH']}"
    environment = {**connections.without_proxies(os.environ), "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [exported] = tmp_path.rglob("profile_export_genai_perf.json")
    measured = json.loads(exported.read_text())
    assert measured["request_count"]["avg"] >= 12
    assert measured["output_sequence_length"]["avg"] > 10
    assert ("inter_token_latency" in measured) is streaming


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
