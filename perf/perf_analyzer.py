"""Runs NVIDIA's perf_analyzer (2.50) and reads the profile that it exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from pdctl.paths import ROOT
from pdserve import connections
from perf.answers import Answer
from perf.prompts import prompts

BUNDLED = ROOT / ".cache" / "perf_analyzer" / "perf_analyzer"
MAX_PROMPTS = 1000

Kind = Literal["concurrency", "request-rate"]


class Failed(Exception):
    """perf_analyzer could not measure; the message has the end of its output."""


class _Output(Struct):
    stats: str = ""


class _Request(Struct):
    timestamp: int
    response_timestamps: list[int]
    response_outputs: list[_Output]


class _Experiment(Struct):
    requests: list[_Request]


class _Profile(Struct):
    experiments: list[_Experiment]


class Workload(Struct, frozen=True):
    """The parameters of every request, and the number of requests at each level of load."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    stream: bool = True
    seed: int = 0


def run(address: str, model: str, workload: Workload, kind: Kind, level: float) -> list[Answer]:
    """Measure a model under one level of load.

    Args:
        address: host and gRPC port.
        level: number of concurrent requests, or of requests per second. There is one level per run,
            since perf_analyzer counts requests (``--request-count``) at a single level only.

    Raises:
        Failed: perf_analyzer ended with an error, or a request did.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, profile = Path(folder) / "input.json", Path(folder) / "profile.json"
        data.write_text(json.dumps({"data": _input(workload)}))
        line = [
            *(shutil.which("perf_analyzer") or str(BUNDLED), "-m", model, "-u", address),
            *("-i", "grpc", "--streaming", "--async", "--input-data", str(data)),
            *("--request-count", str(workload.requests), "--profile-export-file", str(profile)),
            *(f"--{kind}-range", f"{level:g}"),
        ]
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            check=False,
            env=connections.without_proxies(os.environ),
        )
        if done.returncode or not profile.exists():
            words = (done.stdout + done.stderr).partition("Usage:")[0].strip().splitlines()
            raise Failed(
                "\n".join([f"{' '.join(line)} ended with {done.returncode}", *words[-10:]])
            )
        exported = msgspec.json.decode(profile.read_bytes(), type=_Profile)
    return [_answer(request) for one in exported.experiments for request in one.requests]


def _input(workload: Workload) -> list[dict[str, object]]:
    texts = prompts(min(workload.requests, MAX_PROMPTS), workload.prompt_tokens, workload.seed)
    return [
        {
            "text_input": [text],
            "max_tokens": [workload.output_tokens],
            "stream": [workload.stream],
            "ignore_eos": [True],
        }
        for text in texts
    ]


def _answer(request: _Request) -> Answer:
    stats = request.response_outputs[-1].stats if request.response_outputs else ""
    if not stats:
        raise Failed("a request was answered without stats: it failed, the server's log says why")
    return Answer(
        sent=request.timestamp / 1e9,
        responses=[timestamp / 1e9 for timestamp in request.response_timestamps],
        tokens=json.loads(stats)["output_tokens"],
    )
