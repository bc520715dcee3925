"""``pdctl up`` and ``pdctl serve`` look after what they have started, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
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


class Launched:
    """pdctl in processes of its own, on a prefill and a decode in one server."""

    def __init__(self, folder: Path) -> None:
        spec = Spec(name="both", gateway=False, prefill=("prefill_0",), decode=("decode_0",))
        deployment = on_free_ports(msgspec.structs.replace(all_in_one(folder), servers=(spec,)))
        self.file = folder / "deployment.yaml"
        self.file.write_bytes(msgspec.yaml.encode(deployment))
        self.run = folder / "run"
        self.server = Server(deployment, deployment.servers[0], self.run)
        self.tokens: set[str] = set()

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", DRIVER, self.run, MODEL_REPOSITORY, command, *options]
        return subprocess.Popen(
            [*argv, "--file", self.file],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, command: str, *options: str) -> str:
        output, _ = self.start(command, *options).communicate(timeout=60)
        self.remember()
        return output

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
    assert launched.left() == [], "nobody starts again what was stopped"


def test_down_as_soon_as_it_is_up(launched: Launched) -> None:
    """The watchdog has not begun yet, and must not."""
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
