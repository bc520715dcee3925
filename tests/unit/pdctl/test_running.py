"""Tests for what pdctl says of running servers whose deployment file has been edited since."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdctl import cli, fleet, footprint, watchers
from pdctl import started as records
from pdctl.doctor import examination
from pdctl.repository import models
from pdctl.server import Progress, Server
from pdserve import config
from pdserve.config import Decode, Deployment, Engine
from pdserve.config import Server as Spec
from tests.servers import free_ports


class Host:
    """Servers of one deployment file, each a process that only sleeps."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "deployment.yaml"
        self.run = folder / "run"
        self._patch = monkeypatch
        self._program = folder / "tritonserver"
        shutil.copy(shutil.which("sleep") or "", self._program)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        monkeypatch.setattr(cli, "Server", partial(Server, run=self.run))

    def write(self, deployment: Deployment) -> None:
        self.file.write_bytes(msgspec.yaml.encode(deployment))

    def start(self, deployment: Deployment) -> None:
        """Start its servers from the file, as far as commands look at them."""
        self.write(deployment)
        read = config.load(self.file)
        for spec in read.servers:
            folder = self.run / spec.name
            if folder.exists():
                continue
            (folder / "models").mkdir(parents=True)
            (folder / "models" / "deployment.yaml").write_bytes(msgspec.yaml.encode(read))
            token = footprint.new_token(spec.name)
            (folder / "token").write_text(token)
            (folder / "key").write_text("key")
            records.note(folder, records.Started(str(self.file), read.model, "", spec))
            self.processes[spec.name] = subprocess.Popen(
                [self._program, "60"], env={**os.environ, footprint.VARIABLE: token}
            )

    def pdctl(self, *arguments: str) -> int:
        self._patch.setattr(sys, "argv", ["pdctl", *arguments, "--file", str(self.file)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        assert isinstance(raised.value.code, int)
        return raised.value.code


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path, monkeypatch)
    yield host
    for process in host.processes.values():
        process.kill()
        process.wait()


@pytest.fixture
def deployment() -> Deployment:
    http, grpc, metrics = free_ports(3)
    local = Spec("local", "127.0.0.1", http, grpc, metrics, prefill=("p",), decode=("d",))
    return Deployment(model="/models/m", servers=(local,), engine=Engine(kind="emulated"))


def with_more(deployment: Deployment) -> Deployment:
    http, grpc, metrics = free_ports(3)
    more = Spec(
        "more", "127.0.0.1", http, grpc, metrics, gateway=False, prefill=("q",), decode=("e",)
    )
    return msgspec.structs.replace(deployment, servers=(*deployment.servers, more))


class TestLeftBehind:
    """A server that the deployment file has lost, as after going back to an older one."""

    def test_it_is_shown_and_stopped(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start(with_more(deployment))
        host.write(deployment)
        host.pdctl("status", "--json")
        found = json.loads(capsys.readouterr().out)
        assert [entry["server"] for entry in found] == ["local", "more"]
        host.pdctl("reload", "--check")
        assert "`pdctl down --server more` stops it" in capsys.readouterr().out
        assert host.pdctl("down", "--server", "more") == 0
        assert host.processes["more"].poll() is not None
        assert host.processes["local"].poll() is None
        capsys.readouterr()
        host.pdctl("status", "--json")
        found = json.loads(capsys.readouterr().out)
        assert [entry["server"] for entry in found] == ["local"], "it has been stopped"

    def test_all_stop_together(self, host: Host, deployment: Deployment) -> None:
        host.start(with_more(deployment))
        host.write(deployment)
        assert host.pdctl("down") == 0
        assert None not in [process.poll() for process in host.processes.values()]

    def test_it_is_found_by_a_copy_of_the_file(self, host: Host, deployment: Deployment) -> None:
        host.start(with_more(deployment))
        host.file = host.file.with_name("before.yaml")
        host.write(deployment)
        assert host.pdctl("down", "--server", "more") == 0
        assert host.processes["more"].poll() is not None

    def test_servers_of_another_deployment_are_left_alone(
        self, host: Host, deployment: Deployment
    ) -> None:
        theirs = with_more(deployment)
        host.start(msgspec.structs.replace(theirs, servers=theirs.servers[1:]))
        host.file = host.file.with_name("mine.yaml")
        host.write(deployment)
        assert host.pdctl("down") == 0
        assert host.processes["more"].poll() is None

    def test_a_dead_server_of_this_name_leads_to_no_other_deployment(
        self, host: Host, deployment: Deployment
    ) -> None:
        """Its record names the file of a deployment whose other server runs."""
        host.start(with_more(deployment))
        host.processes["local"].kill()
        host.processes["local"].wait()
        host.file = host.file.with_name("mine.yaml")
        ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
        ours = (msgspec.structs.replace(deployment.servers[0], **ports),)
        host.write(msgspec.structs.replace(deployment, model="/models/mine", servers=ours))
        assert host.pdctl("down") == 0
        assert host.processes["more"].poll() is None


class TestUp:
    @pytest.fixture(autouse=True)
    def _live(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Server, "live", lambda server: True)

    def test_other_ports_are_named(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start(deployment)
        (local,) = deployment.servers
        moved = msgspec.structs.replace(local, http_port=9)
        host.write(msgspec.structs.replace(deployment, servers=(moved,)))
        assert host.pdctl("up", "--no-watch") == 0
        said = capsys.readouterr().out
        assert f"servers.local.http_port: {local.http_port} -> 9\n" in said
        assert "`pdctl down --server local` first" in said

    def test_the_same_values_are_not(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start(deployment)
        assert host.pdctl("up", "--no-watch") == 0
        pid = host.processes["local"].pid
        assert capsys.readouterr().out == f"local runs already (process {pid})\n"

    def test_only_new_servers_load(
        self,
        host: Host,
        deployment: Deployment,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def start(servers: list[Server], *, progress: Progress, **_: Any) -> None:
            for server in servers:
                progress(server, set(dict(models(server.spec))), set())

        host.start(deployment)
        host.write(with_more(deployment))
        monkeypatch.setattr(fleet, "start", start)
        monkeypatch.setattr(examination, "check", lambda *_: ())
        assert host.pdctl("up", "--no-watch") == 0
        said = capsys.readouterr().out
        assert "more: e loaded\n" in said
        assert "local: " not in said


class TestReload:
    def test_what_would_change(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start(deployment)
        (local,) = deployment.servers
        gateway = msgspec.structs.replace(deployment.gateway, strict=True)
        moved = (msgspec.structs.replace(local, grpc_port=9),)
        wanted = msgspec.structs.replace(deployment, gateway=gateway, servers=moved)
        host.write(msgspec.structs.replace(wanted, decode=Decode(slots=9)))
        assert host.pdctl("reload", "--check") == 0
        restart = (
            "local has to be restarted, since its own ports or instances change; gateways use the "
            "new ones from the reload on"
        )
        assert capsys.readouterr().out.splitlines() == [
            "would be taken over by local:",
            "  gateway.strict: false -> true",
            "waits for a restart of local:",
            f"  servers.local.grpc_port: {local.grpc_port} -> 9",
            "  decode.slots: 64 -> 9",
            restart,
        ]

    @pytest.mark.parametrize("options", [[], ["--check"]])
    def test_no_server_runs(
        self,
        host: Host,
        deployment: Deployment,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
    ) -> None:
        host.write(deployment)
        assert host.pdctl("reload", *options) == 0
        assert capsys.readouterr().out == (
            "nothing to reload: no server runs\nlocal does not run on this machine\n"
        )


class TestStatus:
    def test_the_model_is_that_which_runs(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.start(deployment)
        host.write(msgspec.structs.replace(deployment, model="/models/other", engine=Engine()))
        host.pdctl("status", "--json")
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["model"], found["engine"]) == ("/models/m", "emulated")
        host.pdctl("status")
        assert "model /models/m, engine emulated" in capsys.readouterr().out


@pytest.fixture
def repairing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the watchdog of every server report that it repairs the server."""
    things = {
        "server": {"state": "repairing", "reason": "its process is gone", "repairs": 0},
        "p": {"state": "healthy", "reason": "", "repairs": 0},
    }
    for health in things.values():
        health["down_s"] = 0.0
    report = {"pid": 7, "at": 0.0, "things": things}
    monkeypatch.setattr(watchers, "reported", lambda folder: report)


@pytest.mark.usefixtures("repairing")
class TestRepair:
    def test_chat_says_so(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.write(deployment)
        assert host.pdctl("chat", "Hello") == 1
        said = capsys.readouterr().err
        assert "the watchdog of local is repairing it (server: its process is gone)" in said
        assert "`pdctl up`" not in said

    def test_status_shows_it_while_the_process_is_gone(
        self, host: Host, deployment: Deployment, capsys: pytest.CaptureFixture[str]
    ) -> None:
        host.write(deployment)
        assert host.pdctl("status") == cli.NOT_READY
        said = capsys.readouterr().out
        assert "local unhealthy" in said
        assert "server repairing" in said
