"""Tests for the watchdog process of a server: one at a time, ended reliably; what it sees."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from pdctl import footprint, private, watchers
from pdctl import started as records
from pdctl.stubs import Stubs
from pdctl.watch import WatchedServer
from pdserve.node.health import Life
from pdserve.node.watchdog import SERVER
from tests.servers import default_deployment

SLEEPER = "import time\nprint('here', flush=True)\ntime.sleep(60)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder whose watchdogs are processes that only sleep."""
    popen = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        assert argv[1:3] == ["-m", "pdctl.watch"]
        started.append(popen([sys.executable, "-c", SLEEPER], **options))
        return started[-1]

    monkeypatch.setattr(watchers.subprocess, "Popen", sleeper)
    yield tmp_path
    for one in started:
        one.kill()
        one.wait()


class TestWatchers:
    def test_no_watchdog(self, folder: Path) -> None:
        assert watchers.pid(folder) is None
        assert watchers.reported(folder) is None
        watchers.end(folder)

    def test_one_at_a_time(self, folder: Path) -> None:
        watchers.start(folder)
        found = watchers.pid(folder)
        assert found is not None
        watchers.start(folder)
        assert watchers.pid(folder) == found

    def test_ended_it_is_gone(self, folder: Path) -> None:
        """A watchdog that has only just been started must not begin to work afterwards."""
        for _ in range(5):
            watchers.start(folder)
            found = watchers.pid(folder)
            assert found is not None
            watchers.end(folder)
            assert watchers.pid(folder) is None
            assert psutil.Process(found).status() == psutil.STATUS_ZOMBIE

    def test_a_stopped_one_can_be_ended(self, folder: Path) -> None:
        watchers.start(folder)
        found = watchers.pid(folder)
        assert found is not None
        os.kill(found, signal.SIGSTOP)
        watchers.end(folder)
        assert watchers.pid(folder) is None

    def test_a_process_with_the_number_of_a_dead_one_is_left_alone(self, folder: Path) -> None:
        (folder / "watch").write_text(str(os.getpid()))
        assert watchers.pid(folder) is None
        watchers.end(folder)

    def test_report(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        watchers.start(folder)
        assert watchers.reported(folder) is None, "it has not reported anything yet"
        found = watchers.pid(folder)
        monkeypatch.setattr(watchers.os, "getpid", lambda: found)
        watchers.report(folder, {"at": 1.5})
        assert watchers.reported(folder) == {"pid": found, "at": 1.5}
        watchers.end(folder)
        assert watchers.reported(folder) is None
        watchers.start(folder)
        assert watchers.reported(folder) is None, "the report of a dead watchdog does not count"


def test_it_looks_after_nothing_that_does_not_run(tmp_path: Path) -> None:
    """A watchdog that starts while its server is being stopped must not start the server again."""
    deployment = default_deployment("emulated")
    folder = tmp_path / deployment.servers[0].name
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "deployment.yaml").write_bytes(msgspec.yaml.encode(deployment))
    argv = [sys.executable, "-m", "pdctl.watch", str(folder)]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "server local has not been started" in found.stderr


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
