"""Test for ``tritonserver --model-repository=model_repository`` without pdctl."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from pdctl import ports, triton
from pdctl.errors import PortTaken
from pdctl.footprint import SHM
from pdctl.paths import MODEL_REPOSITORY
from pdctl.server import Server
from pdserve.config import load
from tests.clients import generate, generate_stream
from tests.servers import START_TIMEOUT_S, Running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.triton


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Running]:
    deployment = load(MODEL_REPOSITORY / "deployment.yaml")
    (spec,) = deployment.servers
    try:
        ports.check(spec)
    except PortTaken as taken:
        pytest.skip(f"the plain repository is for Triton's own ports: {taken}")
    found = triton.locate()
    shared = set(SHM.iterdir())
    command = [str(found.binary), *found.flags, f"--model-repository={MODEL_REPOSITORY}"]
    server = Server(deployment, spec, tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--exit-timeout-secs=5"],
            env=triton.environment(found, "pdserve-plain"),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready(server.http):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Running(server.http, server.grpc, server.metrics, deployment, [])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert not [
        path for path in set(SHM.iterdir()) - shared if path.name.startswith("pdserve-plain")
    ]


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_the_repository_as_it_stands_loads_and_answers(plain: Running) -> None:
    asked = {"text_input": "The capital of France is", "max_tokens": 6}
    answer = generate(plain, **asked)
    parts = list(generate_stream(plain, stream=True, **asked))

    assert "Paris" in answer.text
    assert answer.stats["prefill"] == "prefill"
    assert answer.stats["decode"] == "decode"
    assert "".join(part.text for part in parts) == answer.text
    assert len(parts) > 1
    assert generate(plain, "ensemble", **asked).text == answer.text
