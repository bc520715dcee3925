"""Tests for the agent of a run folder: one at a time, ended reliably; what it sees."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from pdctl import agent, agents, footprint, private, watchers
from pdctl import started as records
from pdctl.agent import Agent
from pdctl.errors import ServerError
from pdctl.stubs import Stubs
from pdctl.watched_server import WatchedServer
from pdserve.errors import DeploymentError
from pdserve.node import epoch
from pdserve.node.health import Life
from pdserve.node.watchdog import SERVER, Dismissed
from tests.servers import default_deployment

SLEEPER = "import time\nprint('here', flush=True)\ntime.sleep(60)"
AGENT = """
import asyncio, fcntl, os, pathlib, sys, time
from pdctl import agents, watchers
run = pathlib.Path(sys.argv[-2])
os.environ.pop(agents.MARK, None)
while True:
    for folder in watchers.wanted(run):
        with watchers.held(folder) as hold:
            while hold and hold.wanted():
                time.sleep(0.01)
    if not any(watchers.wanted(run)):
        break
"""
"""An agent that watches one server at a time, and does nothing else."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a server that counts as started, in a run folder with small agents."""
    popen = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def small(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert argv[1:3] == ["-m", "pdctl.agent"]
        started.append(popen([sys.executable, "-c", AGENT, *argv[2:]], **options))
        return started[-1]

    monkeypatch.setattr(agents.subprocess, "Popen", small)
    yield begun(tmp_path, "local")
    for one in started:
        one.kill()
        one.wait()


def begun(run: Path, name: str, boot: str = "") -> Path:
    """Make the folder of a server as its start would."""
    folder = run / name
    folder.mkdir()
    (folder / "token").write_text(footprint.new_token(name))
    (spec,) = default_deployment("emulated").servers
    records.note(folder, records.Started("", "", "", spec, boot=boot or epoch.boot()))
    return folder


class TestWatchers:
    def test_no_watchdog(self, folder: Path) -> None:
        assert watchers.pid(folder) is None
        assert watchers.reported(folder) is None
        assert not watchers.watched(folder)
        watchers.end(folder)

    def test_one_at_a_time(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        watchers.start(folder)()
        found = watchers.pid(folder)
        assert found is not None
        watchers.start(folder)()
        assert watchers.pid(folder) == found
        monkeypatch.setattr(agents, "END_S", 0.2)
        with pytest.raises(ServerError, match=f"has an agent already .process {found}"):
            agents.locked(folder.parent)

    def test_ended_it_is_gone(self, folder: Path) -> None:
        """An agent that has only just been started must not begin to work afterwards."""
        for _ in range(3):
            watchers.start(folder)
            assert agents.pid(folder.parent) is not None
            watchers.end(folder)
            assert watchers.pid(folder) is None
            assert agents.pid(folder.parent) is None
            assert not agents.every(folder.parent)

    def test_a_stopped_one_can_be_ended(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another agent takes the servers that it watched besides."""
        monkeypatch.setattr(watchers, "END_S", 0.2)
        other = begun(folder.parent, "other")
        watchers.start(folder)()
        found = watchers.pid(folder)
        assert found is not None
        watchers.start(other)
        os.kill(found, signal.SIGSTOP)
        watchers.end(folder)
        assert watchers.pid(folder) is None
        watchers.start(other)()
        assert watchers.pid(other) not in (None, found)

    def test_the_others_are_watched_on(self, folder: Path) -> None:
        watchers.start(folder)()
        found = watchers.pid(folder)
        other = begun(folder.parent, "other")
        (other / "watch").touch()
        watchers.end(folder)
        watchers.start(other)()
        assert watchers.pid(other) == found
        assert watchers.pid(folder) is None

    def test_a_process_with_the_number_of_a_dead_one_is_left_alone(self, folder: Path) -> None:
        (folder.parent / "agent.lock").write_text(str(os.getpid()))
        assert agents.pid(folder.parent) is None
        watchers.end(folder)

    def test_what_was_started_before_the_machine_is_not_watched(self, folder: Path) -> None:
        """Its processes are gone, and an agent would start the server again."""
        old = begun(folder.parent, "old", boot="another")
        (old / "watch").touch()
        (folder / "watch").touch()
        (folder.parent / "control").mkdir()
        assert list(watchers.wanted(folder.parent)) == [folder]
        assert not list(watchers.wanted(folder.parent, but=[folder]))

    def test_report(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        watchers.start(folder)()
        assert watchers.reported(folder) is None, "it has not reported anything yet"
        found = watchers.pid(folder)
        monkeypatch.setattr(watchers.os, "getpid", lambda: found)
        watchers.report(folder, {"at": 1.5})
        assert watchers.reported(folder) == {"pid": found, "at": 1.5}
        watchers.end(folder)
        assert watchers.reported(folder) is None
        watchers.start(folder)()
        assert watchers.reported(folder) is None, "the report of a dead watchdog does not count"

    def test_an_agent_that_cannot_begin_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.modules[__name__], "AGENT", "raise SystemExit(1)")
        wait = watchers.start(folder)
        with pytest.raises(ServerError, match=r"local .* has ended at once: see .*agent\.log"):
            wait()


class TestAgent:
    """The agent itself, on servers that are none."""

    def test_without_servers_it_ends(self, tmp_path: Path) -> None:
        """A server that is being stopped as it starts must not be started again by it."""
        folder = begun(tmp_path, "local")
        (folder / "watch").touch()
        (folder / "token").unlink()
        argv = [sys.executable, "-m", "pdctl.agent", str(tmp_path)]
        found = subprocess.run(argv, env={**os.environ, agents.MARK: str(tmp_path)}, check=False)
        assert found.returncode == 0

    def test_a_fault_of_one_server_is_not_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(agent, "WatchedServer", Watched)
        monkeypatch.setattr(agent, "watch", watched)
        names = ("broken", "missing", "well", "stopped")
        for name in names:
            (begun(tmp_path, name) / "watch").touch()

        async def some_time() -> list[int]:
            running = asyncio.create_task(Agent(tmp_path, stays=False).run())
            counts = []
            for _ in range(2):
                await asyncio.sleep(0.6)
                counts.append(TURNS["well"])
            (tmp_path / "stopped" / "token").unlink()
            for name in names:
                (tmp_path / name / "watch").unlink()
            await asyncio.wait_for(running, 5)  # it ends when there is nothing left
            return counts

        first, second = asyncio.run(some_time())
        assert 0 < first < second
        assert TURNS["broken"] > 1, "it is tried again"
        assert "no key here" in caplog.text
        assert "the watchdog itself has failed" in caplog.text
        assert "no key here" in (tmp_path / "missing" / "watch.log").read_text()
        assert "no key here" not in (tmp_path / "well" / "watch.log").read_text()


TURNS: Counter[str] = Counter()


class Watched:
    """A server that cannot be watched, or can."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.deployment = default_deployment("emulated")
        if self.name == "missing":
            raise DeploymentError("no key here")


async def watched(one: Watched, _: object) -> None:
    if one.name == "stopped":
        raise Dismissed("it has been stopped")
    while True:
        TURNS[one.name] += 1
        if one.name == "broken":
            raise KeyError(one.name)
        await asyncio.sleep(0.05)


def test_the_load_of_a_cancelled_repair_fails_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair is cancelled when its server is restarted, which breaks off the load."""
    deployment = default_deployment("emulated")
    (spec,) = deployment.servers
    folder = tmp_path / spec.name
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "deployment.yaml").write_bytes(msgspec.yaml.encode(deployment))
    (folder / "token").write_text(footprint.new_token("local"))
    private.write(folder / "kv.key", bytes(32))
    records.note(folder, records.Started("", deployment.model, "", spec))
    watched = WatchedServer(folder)
    begun, broken = threading.Event(), threading.Event()
    said: list[dict[str, Any]] = []

    def load(model: str, timeout_s: float) -> None:
        begun.set()
        broken.wait(10)
        raise ConnectionError("no answer in HTTP")

    monkeypatch.setattr(watched.server, "load", load)

    async def cancelled() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: said.append(about))
        repair = asyncio.create_task(watched.restore("prefill_0"))
        await asyncio.to_thread(begun.wait, 10)
        repair.cancel()
        with pytest.raises(asyncio.CancelledError):
            await repair
        broken.set()
        await asyncio.sleep(0.2)  # until the loop has heard of it
        gc.collect()

    asyncio.run(cancelled())
    assert said == []


class TestStubs:
    @pytest.fixture
    def token(self) -> Iterator[str]:
        token = footprint.new_token("local")
        yield token
        for process in footprint.processes([token]):
            process.kill()

    def model(self, token: str, name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, f"/run/local/models/{name}/1/model.py"],
            env={**os.environ, footprint.VARIABLE: token},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def test_how_each_process_is(self, token: str) -> None:
        one, two = self.model(token, "one"), self.model(token, "two")
        stubs = Stubs(token, ["one", "two", "three"])
        assert stubs.look() == {
            SERVER: Life.GONE,
            "one": Life.RUNS,
            "two": Life.RUNS,
            "three": Life.GONE,
        }
        one.send_signal(signal.SIGSTOP)
        two.kill()
        os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WNOWAIT)
        os.waitid(os.P_PID, two.pid, os.WEXITED | os.WNOWAIT)
        lives = stubs.look()
        assert (lives["one"], lives["two"]) == (Life.STOPPED, Life.GONE)
        assert psutil.Process(two.pid).status() == psutil.STATUS_ZOMBIE
        one.kill()
        one.wait()
        assert stubs.look()["one"] is Life.GONE
        two.wait()

    def test_a_model_that_somebody_has_loaded_anew(self, token: str) -> None:
        stubs = Stubs(token, ["one"])
        old = self.model(token, "one")
        assert stubs.look()["one"] is Life.RUNS
        new = self.model(token, "one")
        old.kill()
        old.wait()
        assert stubs.look()["one"] is Life.RUNS
        new.kill()
        new.wait()
        assert stubs.look()["one"] is Life.GONE
        third = self.model(token, "one")
        stubs.renewed("one")
        assert stubs.look()["one"] is Life.RUNS
        stubs.kill("one")
        third.wait()
        assert stubs.look()["one"] is Life.GONE
