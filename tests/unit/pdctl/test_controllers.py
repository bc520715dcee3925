"""Tests for the process of a controller: real processes and a store in a file, without servers."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pdctl import controllers
from pdctl.errors import ServerError
from pdserve.config import Control, Deployment, Server, Transfer
from pdserve.control import stores
from pdserve.control.store.election import LEADER
from pdserve.control.stored import Stored, read

SOON_S = 30.0
SERVER = Server(
    "local", http_port=1, grpc_port=2, metrics_port=3, prefill=("p0", "p1"), decode=("d0", "d1")
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def deployment(folder: Path) -> Deployment:
    """Return a deployment whose key is in this folder."""
    file = folder / "kv.key"
    file.write_bytes(secrets.token_bytes(32))
    file.chmod(0o600)
    control = Control("chat", metrics_port=free_port())
    return Deployment("m", (SERVER,), transfer=Transfer(key_file=str(file)), control=control)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Deployment]:
    found = deployment(tmp_path)
    yield found
    controllers.end(controllers.folder(found, tmp_path))


def stored(made: Deployment, run: Path) -> tuple[Stored, str]:
    """Return what is stored, and who leads."""

    async def work() -> tuple[Stored, str]:
        assert made.control is not None
        store = await stores.opened(made.control, run)
        listing = await store.list_prefix("")
        await store.close()
        leader = {one.key: one.value for one in listing.entries}.get(LEADER, b"")
        return read(listing), leader.decode()

    return asyncio.run(work())


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_begins_goes_on_after_a_kill_and_ends(made: Deployment, tmp_path: Path) -> None:
    folder = controllers.folder(made, tmp_path)
    controllers.start(made, held=False, run=tmp_path)
    first = controllers.pid(folder)
    assert first
    until(lambda: len(stored(made, tmp_path)[0].desired) == 4)
    controllers.start(made, held=False, run=tmp_path)
    assert controllers.pid(folder) == first, "there is one already"
    assert made.control
    page = urllib.request.urlopen(f"http://127.0.0.1:{made.control.metrics_port}/metrics")
    assert "pdserve_control_leader 1\n" in page.read().decode()
    before = stored(made, tmp_path)[0]
    os.kill(first, signal.SIGKILL)
    until(lambda: controllers.pid(folder) is None)
    controllers.start(made, held=False, run=tmp_path)
    second = controllers.pid(folder)
    assert second
    assert second != first
    until(lambda: stored(made, tmp_path)[1].endswith(f"/{second}"))
    time.sleep(1)
    after = stored(made, tmp_path)[0]
    assert after.desired == before.desired
    assert after.generation >= before.generation > 0
    assert controllers.end(folder)
    assert controllers.pid(folder) is None
    assert not controllers.end(folder)
    assert stored(made, tmp_path)[1] == "", "nobody leads: another one can at once"
    assert oct(folder.stat().st_mode)[-3:] == "700"
    assert oct((folder / "deployment.yaml").stat().st_mode)[-3:] == "600"


def test_two_on_one_host_have_one_leader_and_the_other_follows(
    made: Deployment, tmp_path: Path
) -> None:
    folder = controllers.folder(made, tmp_path)
    controllers.start(made, held=False, run=tmp_path)
    first = controllers.pid(folder)
    assert first
    until(lambda: stored(made, tmp_path)[1].endswith(f"/{first}"))
    command = [sys.executable, "-m", "pdctl.controller", str(folder)]
    second = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: f"process {second.pid}" in (folder / "controller.log").read_text())
        time.sleep(1.5)
        assert stored(made, tmp_path)[1].endswith(f"/{first}")
        os.kill(first, signal.SIGKILL)
        until(lambda: stored(made, tmp_path)[1].endswith(f"/{second.pid}"))
    finally:
        second.terminate()
        assert second.wait(SOON_S) == 0
    assert "no metrics at port" in (folder / "controller.log").read_text()


def test_a_held_one_ends_with_whoever_holds_it(made: Deployment, tmp_path: Path) -> None:
    folder = controllers.give(made, tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from pdctl import controllers; "
        "from pdserve import config; made = config.load(Path(sys.argv[1]) / 'deployment.yaml'); "
        "controllers.start(made, held=True, run=Path(sys.argv[2])); print('held', flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    holder = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert holder.stdout is not None
    until(lambda: controllers.pid(folder))
    until(lambda: stored(made, tmp_path)[1])
    holder.kill()
    holder.wait()
    until(lambda: controllers.pid(folder) is None)


def test_the_store_of_another_deployment_is_refused_and_both_are_named(
    made: Deployment, tmp_path: Path
) -> None:
    controllers.start(made, held=False, run=tmp_path)
    folder = controllers.folder(made, tmp_path)
    controllers.end(folder)
    (tmp_path / "elsewhere").mkdir()
    other = deployment(tmp_path / "elsewhere")
    with pytest.raises(ServerError, match=r"has ended at once: see .*controller\.log"):
        controllers.start(other, held=False, run=tmp_path)
    said = (folder / "controller.log").read_text()
    assert re.search(r"belongs to the deployment chat with the key \w{16}, and not to chat", said)


def test_a_reload_reaches_it_and_a_broken_one_does_not(made: Deployment, tmp_path: Path) -> None:
    controllers.start(made, held=False, run=tmp_path)
    until(lambda: len(stored(made, tmp_path)[0].desired) == 4)
    more = replace(SERVER, decode=(*SERVER.decode, "d2"))
    controllers.give(replace(made, servers=(more,)), tmp_path)
    until(lambda: "d2" in stored(made, tmp_path)[0].desired)
    folder = controllers.folder(made, tmp_path)
    (folder / "deployment.yaml").write_text("model: 1: 2")
    until(lambda: "refused, the old one stays" in (folder / "controller.log").read_text())
    assert "d2" in stored(made, tmp_path)[0].desired
    assert controllers.pid(folder)
