"""Tests for the launcher with the real server, on models that do nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from pdctl import footprint
from pdctl.server import Server
from pdserve.config import Deployment, Engine
from pdserve.config import Server as Spec
from tests.servers import on_free_ports, running

pytestmark = pytest.mark.triton

CONFIG = """
name: "template"
backend: "python"
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """
import os, pathlib
class TritonPythonModel:
    def initialize(self, args):
        name = f"{os.environ['PDSERVE_SHM_PREFIX']}-{args['model_name']}"
        pathlib.Path("/dev/shm", name).write_bytes(b"arena")
    def execute(self, requests):
        raise AssertionError
"""
BROKEN = MODEL.replace("name =", "raise ValueError('no weights in /nowhere')\n        name =")

# The command line as it is, except for the folders of models and state.
DRIVER = """
import sys
from pathlib import Path
from pdctl import paths
paths.RUN, paths.MODEL_REPOSITORY = map(Path, sys.argv[1:3])
from pdctl import cli
del sys.argv[1:3]
cli.main()
"""


class Launcher:
    """Runs pdctl in separate processes, for a temporary deployment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.write_model("prefill", MODEL)
        self.write_model("decode", MODEL)
        spec = Spec(name="launch_test", gateway=False, prefill=("p_0",), decode=("d_0",))
        # The model is never computed; `pdctl up` only looks for it.
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text('{"vocab_size": 8}')
        made = Deployment(model=str(model), servers=(spec,), engine=Engine(kind="emulated"))
        self.deployment = on_free_ports(made)
        (folder / "deployment.yaml").write_bytes(msgspec.yaml.encode(self.deployment))
        self.server = Server(
            self.deployment, self.deployment.servers[0], folder / "run", self.source
        )
        self.tokens: set[str] = set()

    def write_model(self, name: str, text: str) -> None:
        folder = self.source / name / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.py").write_text(text)
        (folder.parent / "config.pbtxt").write_text(CONFIG)

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        if command in ("up", "serve"):
            options = (*options, "--no-watch")  # these models answer no requests
        return subprocess.Popen(
            [
                *(sys.executable, "-c", DRIVER, self.folder / "run", self.source),
                *(command, *options, "--file", self.folder / "deployment.yaml"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=60)
        self.remember()
        return process.returncode, output

    def remember(self) -> str:
        token = self.server.token or ""
        self.tokens |= {token} - {""}
        return token

    def serve(self) -> subprocess.Popen[str]:
        """Start ``pdctl serve``, and wait until all is ready."""
        process = self.start("serve")
        assert process.stdout is not None
        output = []
        while "Ctrl-C" not in (line := process.stdout.readline()):
            assert line, output
            output.append(line)
        self.remember()
        return process

    def traces(self) -> list[object]:
        """Return what is left of any start: processes, shared memory, open ports."""
        spec = self.server.spec
        open_ports = []
        for port in (spec.http_port, spec.grpc_port, spec.metrics_port):
            with socket.socket() as probe:
                if probe.connect_ex((spec.host, port)) == 0:
                    open_ports.append(port)
        left: list[object] = [*footprint.processes(self.tokens), *open_ports]
        return left + [region for token in self.tokens for region in footprint.regions(token)]


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.remember()
    footprint.erase(launcher.tokens)


def test_up_status_down(launcher: Launcher) -> None:
    status, output = launcher.run("up")
    assert status == 0, output
    assert "launch_test is ready after" in output
    assert launcher.server.index() == {"p_0": "READY", "d_0": "READY"}
    regions = footprint.regions(launcher.remember())
    assert len(regions) == 4  # two regions of Triton, two of the models
    # These models do not narrow their regions themselves.
    assert {region.stat().st_mode & 0o777 for region in regions} == {0o600}
    assert (launcher.server.folder / "key").stat().st_mode & 0o777 == 0o600

    assert launcher.run("status")[0] == 0
    pid = launcher.server.pid
    status, output = launcher.run("up")
    assert status == 0
    assert f"runs already (process {pid})" in output

    status, output = launcher.run("down")
    assert status == 0
    assert f"stopped (process {pid})" in output
    assert launcher.traces() == []
    assert launcher.run("status")[0] == 3
    assert "was not running" in launcher.run("down")[1]


@pytest.mark.parametrize("name", ["two words", 'it\'s "$HOME" `x` #1; a=b,c & (é) [d] \\\\ *'])
def test_a_path_that_a_shell_would_take_apart(tmp_path: Path, name: str) -> None:
    """The Python backend quotes nothing in the command that starts a stub."""
    folder = tmp_path / name
    folder.mkdir()
    launcher = Launcher(folder)
    try:
        status, output = launcher.run("up", "--timeout", "30")
        assert status == 0, output
        assert launcher.server.index() == {"p_0": "READY", "d_0": "READY"}
        assert launcher.run("down")[0] == 0
        assert launcher.traces() == []
    finally:
        launcher.remember()
        footprint.erase(launcher.tokens)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_nothing(launcher: Launcher, number: signal.Signals) -> None:
    serve = launcher.serve()
    assert len(footprint.regions(launcher.remember())) == 4
    serve.send_signal(number)
    assert serve.wait(20) == (-9 if number == signal.SIGKILL else 0)
    wait_until(lambda: launcher.traces() == [], 20)


@pytest.mark.parametrize("command", ["up", "serve"])
def test_interrupted_while_it_starts(launcher: Launcher, command: str) -> None:
    launcher.write_model("decode", "import time\ntime.sleep(60)\n" + MODEL)
    process = launcher.start(command)
    wait_until(lambda: launcher.server.pid)
    launcher.remember()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert launcher.traces() == []


def test_broken_model(launcher: Launcher) -> None:
    launcher.write_model("decode", BROKEN)
    status, output = launcher.run("up")
    assert status == 1
    assert "server launch_test ended with 1" in output
    assert "model d_0: Internal: ValueError: no weights in /nowhere" in output
    assert str(launcher.server.log) in output
    assert "p_0" not in output.split("ended with")[1]
    assert launcher.traces() == []


def test_server_that_dies_is_reported(launcher: Launcher) -> None:
    serve = launcher.serve()
    pid = launcher.server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    output, _ = serve.communicate(timeout=20)
    assert serve.returncode == 1
    assert "launch_test was killed by signal 9" in output
    assert launcher.traces() == []


def test_leftovers_of_a_crash(launcher: Launcher) -> None:
    assert launcher.run("up")[0] == 0
    crashed = launcher.remember()
    everyone = footprint.processes([crashed])
    for process in everyone:
        process.suspend()  # otherwise the stubs would clean up when they miss their server
    for process in everyone:
        process.kill()
    psutil.wait_procs(everyone, 5)
    assert footprint.regions(crashed)
    assert "stopped" in launcher.run("status")[1]

    assert launcher.run("up")[0] == 0
    assert footprint.regions(crashed) == []
    assert launcher.run("down")[0] == 0
    assert launcher.traces() == []


def test_port_taken(launcher: Launcher) -> None:
    port = launcher.server.spec.grpc_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        status, output = launcher.run("up")
    assert status == 1
    assert f"grpc_port {port} on 127.0.0.1" in output
    assert f"(process {os.getpid()})" in output
    assert launcher.traces() == []


def test_not_ready_in_time(launcher: Launcher) -> None:
    launcher.write_model("decode", "import time\ntime.sleep(60)\n" + MODEL)
    status, output = launcher.run("up", "--timeout", "6")
    assert status == 1
    assert "not ready after 6 s; still loading: d_0" in output
    assert launcher.traces() == []


def test_running_for_tests(tmp_path: Path, launcher: Launcher) -> None:
    with running(launcher.deployment, tmp_path / "other", launcher.source) as server:
        assert server.servers[0].index() == {"p_0": "READY", "d_0": "READY"}
        launcher.tokens.add(server.servers[0].token or "")
    assert launcher.traces() == []
