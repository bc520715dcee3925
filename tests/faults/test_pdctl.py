"""Tests that ``pdctl up`` and ``serve`` watch the servers that they start, and clean up."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from pdctl import footprint, watchers
from pdctl.paths import MODEL_REPOSITORY
from pdctl.server import Server
from pdserve.config import Server as Spec
from tests.clients import wait_until
from tests.faults.serving import RESTARTED_S, all_in_one, leader, on_this_machine
from tests.servers import on_free_ports
from tests.triton.test_launcher import DRIVER

pytestmark = pytest.mark.triton

WAITS = """
import os
import time
while not os.path.exists({go!r}):
    time.sleep(0.1)
"""


class Launched:
    """Runs pdctl in separate processes, for a prefill and a decode in one server."""

    def __init__(self, folder: Path) -> None:
        spec = Spec(name="both", gateway=False, prefill=("prefill_0",), decode=("decode_0",))
        deployment = on_free_ports(msgspec.structs.replace(all_in_one(folder), servers=(spec,)))
        self.file = folder / "deployment.yaml"
        self.file.write_bytes(msgspec.yaml.encode(deployment))
        self.run, self.source = folder / "run", MODEL_REPOSITORY
        self.server = Server(deployment, deployment.servers[0], self.run)
        self.tokens: set[str] = set()

    def argv(self, command: str, *options: str, file: Path | None = None) -> list[str]:
        driver = [sys.executable, "-c", DRIVER, str(self.run), str(self.source)]
        return [*driver, command, *options, "--file", str(file or self.file)]

    def start(self, command: str, *options: str, file: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(command, *options, file=file),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, command: str, *options: str) -> str:
        output, _ = self.start(command, *options).communicate(timeout=60)
        self.remember()
        return output

    def told(self, command: str, *options: str, file: Path | None = None) -> tuple[int, str]:
        """Return exit status and output."""
        process = self.start(command, *options, file=file)
        output, _ = process.communicate(timeout=60)
        self.remember()
        return process.returncode, output

    def slow(self) -> None:
        """A prefill that is not loaded before `go`."""
        source = self.file.parent / "slow"
        shutil.copytree(self.source, source, ignore=shutil.ignore_patterns("__pycache__"))
        code = source / "prefill" / "1" / "model.py"
        code.write_text(WAITS.format(go=str(self._go)) + code.read_text())
        self.source = source

    @property
    def _go(self) -> Path:
        return self.file.parent / "go"

    def loading(self) -> subprocess.Popen[str]:
        """Run ``up`` until it has started the server and waits for it."""
        self.slow()
        process = self.start("up")
        wait_until(lambda: self.server.pid is not None, on_this_machine(10))
        self.remember()
        return process

    def go(self) -> None:
        self._go.touch()

    def remember(self) -> None:
        self.tokens |= {self.server.token or ""} - {""}

    def crash(self) -> None:
        """Kill the server, and wait until its watchdog has started it again."""
        before = leader(self.server)
        before.kill()
        wait_until(lambda: self.server.pid not in (None, before.pid), on_this_machine(RESTARTED_S))
        wait_until(self.server.ready, on_this_machine(RESTARTED_S))
        self.remember()

    def left(self) -> list[object]:
        found: list[object] = [*footprint.processes(self.tokens)]
        return found + [watchers.pid(self.server.folder)] * (self.watchdog is not None)

    @property
    def watchdog(self) -> int | None:
        return watchers.pid(self.server.folder)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    watchers.end(launched.server.folder)
    launched.remember()
    footprint.erase(launched.tokens)


def test_up_until_down(launched: Launched) -> None:
    assert "both is ready" in launched.call("up")
    first = launched.watchdog
    assert first is not None
    launched.crash()
    wait_until(lambda: f"watchdog process {first}" in launched.call("status"), 5)
    (state,) = json.loads(launched.call("status", "--json"))
    assert state["state"] == "ready"
    assert state["watchdog"]["things"]["server"]["repairs"] == 1

    watchers.end(launched.server.folder)
    assert "no watchdog" in launched.call("status")
    assert "runs already" in launched.call("up")
    assert launched.watchdog not in (None, first)

    launched.call("down")
    assert launched.left() == []
    time.sleep(2)
    assert launched.left() == [], "a server that was stopped is not started again"


def test_down_as_soon_as_it_is_up(launched: Launched) -> None:
    """The watchdog has not begun yet, and must not begin."""
    launched.call("up")
    launched.call("down")
    time.sleep(2)
    assert launched.left() == []


def test_a_killed_serve_takes_along_what_its_watchdog_has_started(launched: Launched) -> None:
    serve = launched.start("serve")
    assert serve.stdout is not None
    while "Ctrl-C" not in (line := serve.stdout.readline()):
        assert line
    wait_until(lambda: watchers.reported(launched.server.folder) is not None, 10)
    launched.crash()
    assert serve.poll() is None
    serve.kill()
    wait_until(lambda: launched.left() == [], 20)


def test_a_second_up_joins_the_first(launched: Launched) -> None:
    """A server that has not begun yet counts as loading, not as failed."""
    first = launched.loading()
    pid = launched.server.pid
    status, output = launched.told("status")
    assert status == 3
    assert "both starting" in output
    assert "`pdctl up` waits for it" in output
    second, third = launched.start("up"), launched.start("up", "--server", "both")
    for one in (second, third):
        assert one.stdout is not None
        assert f"runs already (process {pid})" in one.stdout.readline()
    launched.go()
    said = [one.communicate(timeout=120)[0] for one in (first, second, third)]
    assert [one.returncode for one in (first, second, third)] == [0, 0, 0], said
    assert all("both is ready after" in one for one in said), said
    assert launched.told("status")[0] == 0
    wait_until(lambda: watchers.reported(launched.server.folder) is not None, on_this_machine(10))
    time.sleep(1)
    state = watchers.reported(launched.server.folder)
    assert state is not None
    assert sum(health["repairs"] for health in state["things"].values()) == 0, state
    assert launched.server.pid == pid


def test_a_watchdog_that_comes_while_the_server_loads_waits(launched: Launched) -> None:
    first = launched.loading()
    pid = launched.server.pid
    watchers.start(launched.server.folder)()
    time.sleep(2)
    launched.go()
    assert "both is ready" in first.communicate(timeout=120)[0]
    assert first.returncode == 0
    assert launched.server.pid == pid


def test_down_while_it_loads(launched: Launched) -> None:
    up = launched.loading()
    joined = launched.start("up")
    assert joined.stdout is not None
    assert "runs already" in joined.stdout.readline()
    assert launched.told("down")[0] == 0
    for one in (up, joined):
        output, _ = one.communicate(timeout=60)
        assert one.returncode == 1, output
        assert "server both was stopped by another pdctl" in output.splitlines()[-1]
        assert "Traceback" not in output
    time.sleep(2)
    assert launched.left() == []


@pytest.mark.full
def test_up_and_down_at_once(launched: Launched) -> None:
    """Whichever command is last, its result is one line, and nothing is left over."""
    for _ in range(3):
        both = [launched.start("up"), launched.start("down"), launched.start("down")]
        said = [one.communicate(timeout=60)[0] for one in both]
        launched.remember()
        assert "Traceback" not in "".join(said), said
        assert all(one.returncode in (0, 1) for one in both)
    assert launched.told("down")[0] == 0
    assert launched.left() == []


@pytest.mark.parametrize(
    "closed",
    [
        ">&- <&- 2>&-",
        *(pytest.param(one, marks=pytest.mark.full) for one in (">&-", "<&-", "2>&-")),
    ],
)
def test_without_standard_descriptors(launched: Launched, closed: str) -> None:
    """The watchdog's lock gets no standard descriptor's number, and ``down`` is final."""
    line = f"{shlex.join(launched.argv('up'))} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=120, check=False)
    launched.remember()
    assert done.returncode == 0, done
    assert launched.watchdog is not None
    assert launched.told("status")[0] == 0
    assert launched.told("down")[0] == 0
    time.sleep(2)
    assert launched.left() == []


def test_down_ends_a_watchdog_that_holds_no_lock(launched: Launched) -> None:
    launched.call("up")
    found = launched.watchdog
    assert found is not None
    (launched.server.folder / "watch").unlink()
    assert launched.watchdog is None
    assert launched.told("down")[0] == 0
    time.sleep(2)
    assert launched.left() == []
    assert not psutil.pid_exists(found)


def test_what_nobody_looks_after_is_not_as_it_should_be(launched: Launched) -> None:
    assert launched.told("up", "--no-watch")[0] == 0
    status, output = launched.told("status")
    assert status == 0
    assert "no watchdog, as it was started" in output
    assert launched.told("up")[0] == 0
    assert "watchdog process" in launched.call("status")
    watchers.end(launched.server.folder)
    status, output = launched.told("status")
    assert status == 3
    assert "no watchdog: nothing is repaired" in output


def test_another_deployment_with_a_server_of_the_same_name(
    launched: Launched, tmp_path: Path
) -> None:
    """It is refused with both names; the same deployment, moved or edited, is accepted."""
    assert launched.told("up")[0] == 0
    pid = launched.server.pid
    mine = launched.server.deployment
    other = tmp_path / "other.yaml"
    other.write_bytes(msgspec.yaml.encode(on_free_ports(mine)))
    for command in ("up", "serve", "status", "reload", "links", "render", "down"):
        status, output = launched.told(command, file=other)
        assert status == 1, (command, output)
        assert len(output.strip().splitlines()) == 1, output
        for part in (str(launched.file), str(other), f"process {pid}"):
            assert part in output, (command, output)
    for command in ("chat", "demo"):
        process = subprocess.run(
            [*launched.argv(command, file=other), "Hello"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 1
        assert str(launched.file) in process.stderr

    status, output = launched.told("render")
    assert (status, launched.server.pid) == (1, pid)
    assert "`pdctl reload` applies" in output

    moved = tmp_path / "moved.yaml"
    moved.write_bytes(launched.file.read_bytes())
    assert launched.told("status", file=moved)[0] == 0
    gateway = msgspec.structs.replace(mine.gateway, ttft_limit_ms=1234)
    edited = on_free_ports(msgspec.structs.replace(mine, gateway=gateway))
    launched.file.write_bytes(msgspec.yaml.encode(edited))
    assert launched.told("status")[0] == 0, "it is asked where it listens"
    status, output = launched.told("reload")
    assert status == 0, output
    assert "1234" in output
    assert launched.told("status")[0] == 0
    assert launched.told("down")[0] == 0
    assert launched.left() == []
