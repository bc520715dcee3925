"""Tests for the table of what is done because of Triton, in docs/operations.md."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from pdctl.doctor import versions
from pdctl.paths import ROOT
from pdctl.triton import Keys, Triton, command, parse_help
from pdserve.config import Server

TEXT = (ROOT / "docs" / "operations.md").read_text()
SECTION = TEXT.partition("\n## Newer Tritons\n")[2].partition("\n## ")[0]
FOLDERS = (ROOT / "python_backends", ROOT / "tools")
ISSUE = re.compile(r"(?:python_backend|core|server)#\d+")


def test_every_module_that_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:pdctl|pdserve)\.[a-z_.]+)`", SECTION))
    assert len(named) > 8
    for name in named:
        path = f"{name.replace('.', '/')}.py"
        if not any((folder / path).exists() for folder in FOLDERS):
            module, _, function = name.rpartition(".")
            assert hasattr(importlib.import_module(module), function), name


def test_every_fault_of_triton_that_the_code_names_is_in_it() -> None:
    """Whoever works around another one says so there."""
    files = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    text = "".join(path.read_text() for path in (*files, ROOT / "Dockerfile"))
    named = set(ISSUE.findall(text))
    assert {"python_backend#384", "python_backend#430", "python_backend#439"} <= named
    assert named <= set(ISSUE.findall(SECTION))


@pytest.mark.parametrize(
    ("fault", "release", "server"),
    [("python_backend#384", "24.11", "2.52.0"), ("python_backend#439", "26.07", "2.71.0")],
)
def test_what_doctor_wants_is_what_it_says(fault: str, release: str, server: str) -> None:
    [row] = [row for row in SECTION.splitlines() if fault in row]
    assert release in row
    assert not versions.within(server, versions.NUMPY_1)
    assert versions.within(server, versions.BLS) == (release == "26.07")


# The options of a server in the branch r26.08 (src/command_line_parser.cc), as far as they are new
# since 24.10 or are used here.
NEWEST = """
  --allow-client-shm <boolean>
\tAllow clients to register/unregister and use shared memory regions.
  --allow-sagemaker <boolean>
\tAllow the server to listen for Sagemaker requests.
  --allow-vertex-ai <boolean>
\tAllow the server to listen for Vertex AI requests.
  --disable-auto-complete-config
\tIf set, disables the triton and backends from auto completing.
  --exit-timeout-secs <integer>
\tTimeout (in seconds) when exiting.
  --grpc-address <string>
\tThe address for the grpc server to bind to.
  --grpc-header-forward-pattern <string>
\tThe regular expression pattern.
  --grpc-http2-max-ping-strikes <integer>
\tMaximum number of bad pings.
  --grpc-http2-min-recv-ping-interval-without-data <integer>
\tIf there are no data/header frames being sent.
  --grpc-infer-thread-count <integer>
\tThe number of gRPC inference handler threads.
  --grpc-keepalive-permit-without-calls <integer>
\tAllows keepalive pings to be sent even if there are no calls in flight.
  --grpc-max-response-pool-size <integer>
\tThe maximum number of inference response objects.
  --grpc-port <integer>
\tThe port for the server to listen on for GRPC requests.
  --grpc-restricted-protocol <<string>:<string>=<string>>
\tSpecify restricted GRPC protocol setting. Allowed protocols: health,
\tmetadata, inference, shared-memory, model-config, model-repository,
\tstatistics, trace, logging
  --http-address <string>
\tThe address for the http server to bind to.
  --http-max-input-size <integer>
\tMaximum allowed HTTP request input size in bytes.
  --http-port <integer>
\tThe port for the server to listen on for HTTP requests.
  --http-restricted-api <<string>:<string>=<string>>
\tSpecify restricted HTTP api setting. Allowed APIs: health, metadata,
\tinference, shared-memory, model-config, model-repository, statistics,
\ttrace, logging
  --backend-config <<string>,<string>=<string>>
\tSpecify a backend-specific configuration setting.
  --load-model <string>
\tName of the model to be loaded on server startup.
  --metrics-address <string>
\tThe address for the metrics server to bind to.
  --metrics-port <integer>
\tThe port reporting prometheus metrics.
  --model-control-mode <string>
\tSpecify the mode for model management.
  --model-repository <string>
\tPath to model repository directory.
"""


def test_the_newest_triton_that_was_read_takes_every_option() -> None:
    known = parse_help(NEWEST)
    spec = Server("local", client_shared_memory="key")
    line = command(
        *(Triton(Path("tritonserver"), (), {}), known, spec, Path("models"), "token"),
        *(Keys("a", "b"), 1 << 20),
    )
    given = {word.partition("=")[0] for word in line[1:]}
    assert given <= {f"--{name}" for name in known.names}
    assert {"--http-max-input-size", "--allow-client-shm", "--http-restricted-api"} <= given
    assert "--allow-client-shm=true" in line
