"""Tests for pdctl without a server."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from pdctl import cli, footprint, links, log, ports, watchers
from pdctl import started as records
from pdctl.chat import Question, ask
from pdctl.endpoint import state_of
from pdctl.errors import PortTaken, ServerError
from pdctl.overview import page as page_of
from pdctl.overview import summary
from pdctl.repository import models, render
from pdctl.server import Server
from pdctl.status import values
from pdctl.timeline import phases, timeline
from pdserve import config
from pdserve.config import Deployment, Transfer
from pdserve.config import Server as Spec
from pdserve.errors import DeploymentError
from tests.servers import free_ports

SPEC = Spec(name="local", prefill=("prefill_0", "prefill_1"), decode=("decode_0",))
DEPLOYMENT = Deployment(
    model="/models/m", servers=(SPEC,), transfer=Transfer(key_file="/keys/kv.key")
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model_repository"
    for name in (*config.GATEWAY_MODELS, "prefill", "decode", "flexible"):
        (folder / name / "1" / "__pycache__").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(f"# {name}")
        (folder / name / "config.pbtxt").write_text(
            f'# A model.\nname: "{name}"\ninput [{{ name: "x" dims: [1] }}]\n'
        )
    return folder


class TestRender:
    def test_every_model_of_a_server(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "run" / "local" / "models"
        render(DEPLOYMENT, SPEC, source, target)
        assert sorted(entry.name for entry in target.iterdir()) == sorted(
            [*(name for name, _ in models(SPEC)), "deployment.yaml"]
        )
        text = (target / "prefill_1" / "config.pbtxt").read_text()
        assert text == '# A model.\nname: "prefill_1"\ninput [{ name: "x" dims: [1] }]\n'
        assert (target / "decode_0" / "1" / "model.py").read_text() == "# decode"
        assert not list(target.rglob("__pycache__"))

    def test_a_worker_has_no_gateway(self) -> None:
        worker = Spec(name="worker", gateway=False, decode=("decode_0",))
        assert list(models(worker)) == [("decode_0", "decode")]

    def test_instances_that_may_change_roles_have_a_template_of_their_own(
        self, source: Path, tmp_path: Path
    ) -> None:
        flexible = msgspec.structs.replace(SPEC, flexible=("prefill_1", "decode_0"))
        assert dict(models(flexible)).items() >= {
            ("prefill_0", "prefill"),
            ("prefill_1", "flexible"),
            ("decode_0", "flexible"),
        }
        render(DEPLOYMENT, flexible, source, tmp_path / "models")
        assert (tmp_path / "models" / "decode_0" / "1" / "model.py").read_text() == "# flexible"

    def test_deployment_beside_the_models(self, source: Path, tmp_path: Path) -> None:
        render(DEPLOYMENT, SPEC, source, tmp_path / "models")
        assert config.load(tmp_path / "models" / "deployment.yaml") == DEPLOYMENT

    def test_replaces_what_was_there(self, source: Path, tmp_path: Path) -> None:
        render(DEPLOYMENT, SPEC, source, tmp_path / "models")
        fewer = msgspec.structs.replace(SPEC, prefill=("prefill_0",))
        render(DEPLOYMENT, fewer, source, tmp_path / "models")
        assert not (tmp_path / "models" / "prefill_1").exists()

    def test_missing_model(self, source: Path, tmp_path: Path) -> None:
        (source / "decode" / "config.pbtxt").unlink()
        with pytest.raises(DeploymentError, match=r"no config\.pbtxt for the model decode_0"):
            render(DEPLOYMENT, SPEC, source, tmp_path / "models")


class TestDeployment:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "it is empty"),
            ("model: m\nservers: []", "servers"),
            ("model: m\nservers: [{name: a}]", "no server has a prefill instance"),
            ("model: m\nservers: [{name: A-B}]", r"servers\[0\]\.name"),
            ("model: m\nservers: [{name: a, http_port: 0}]", r"servers\[0\]\.http_port"),
            ("model: m\nservers: [{name: a, colour: red}]", "colour"),
            (
                "model: m\nservers: [{name: a}]\ntransfer: {require: tcp}",
                r"'tcp'.*transfer\.require",
            ),
            (
                "model: m\nservers: [{name: a}]\ntransfer: {transports: [shm, ucx]}",
                r"'ucx'.*transfer\.transports\[1\]",
            ),
            ("model: m\nservers: [{name: a}]\ntransfer: {pulls: 0}", r"transfer\.pulls"),
            ("model: m\nservers: [{name: a, http_port: 8001}]", "8001.* more than once"),
            ("model: m\nservers: [{name: a, prefill: [x], decode: [x]}]", "instance x is used"),
            ("model: [", "while parsing"),
        ],
    )
    def test_an_error_names_the_field(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "deployment.yaml"
        file.write_text(text)
        with pytest.raises(DeploymentError, match=f"(?s){re.escape(str(file))}.*{message}"):
            config.load(file)

    @pytest.mark.parametrize(
        ("device", "hosts", "wanted"),
        [
            ("cpu", ["127.0.0.1"], ("shm",)),
            ("cpu", ["10.0.0.1", "10.0.0.1"], ("shm",)),
            ("cpu", ["10.0.0.1", "10.0.0.2"], ("shm", "nixl")),
            ("cuda:0", ["127.0.0.1"], ("cuda_ipc", "shm")),
            ("cuda", ["10.0.0.1", "10.0.0.2"], ("cuda_ipc", "shm", "nixl")),
        ],
    )
    def test_transports_are_those_that_can_be_of_use(
        self, device: str, hosts: list[str], wanted: tuple[str, ...]
    ) -> None:
        servers = tuple(Spec(name=f"s{i}", host=host) for i, host in enumerate(hosts))
        made = Deployment(model="m", servers=servers, engine=config.Engine(device=device))
        assert made.transports == wanted
        told = msgspec.structs.replace(made, transfer=Transfer(transports=("nixl",)))
        assert told.transports == ("nixl",)

    def test_the_command_line_says_it_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        missing = tmp_path / "deployment.yaml"
        monkeypatch.setattr(sys, "argv", ["pdctl", "status", "--file", str(missing)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        assert raised.value.code == 1
        assert capsys.readouterr().err == f"pdctl: {missing}: No such file or directory\n"


class TestOneServer:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """Return the file of a deployment of two servers that do not run."""
        file = tmp_path / "deployment.yaml"
        file.write_text(
            "model: m\n"
            "servers:\n"
            "  - {name: front, prefill: [a], http_port: 71, grpc_port: 72, metrics_port: 73}\n"
            "  - {name: back, decode: [b], http_port: 81, grpc_port: 82, metrics_port: 83}\n"
        )
        return file

    def pdctl(self, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["pdctl", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        assert isinstance(raised.value.code, int)
        return raised.value.code

    @pytest.mark.parametrize(
        ("options", "names"),
        [([], ["front", "back"]), (["--server", "back"], ["back"])],
    )
    def test_status(
        self,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
        names: list[str],
    ) -> None:
        code = self.pdctl(monkeypatch, "status", "--json", "--file", file, *options)
        assert code == cli.NOT_READY
        found = json.loads(capsys.readouterr().out)
        assert [entry["server"] for entry in found] == names

    @pytest.mark.parametrize("command", ["up", "serve", "down", "status"])
    def test_unknown_server(
        self,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        command: str,
    ) -> None:
        code = self.pdctl(monkeypatch, command, "--file", file, "--server", "middle")
        assert code == 1
        assert capsys.readouterr().err == (
            f"pdctl: {file}: no server is named middle; there are: front, back\n"
        )

    def test_chat_without_a_gateway_that_is_ready(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.pdctl(monkeypatch, "chat", "Hello", "--file", file) == 1
        assert capsys.readouterr().err == (
            "pdctl: no gateway is ready: front (http://127.0.0.1:71), back (http://127.0.0.1:81); "
            "`pdctl up` starts them\n"
        )

    def test_a_server_that_has_gone_is_one_error(self) -> None:
        """It is one error, at whatever point of the stream the connection breaks."""
        (port,) = free_ports(1)
        for _ in range(20):
            with pytest.raises(ServerError, match=rf"^127\.0\.0\.1:{port}: .*UNAVAILABLE"):
                list(ask(f"127.0.0.1:{port}", Question("Hello")))


class TestPorts:
    def test_names_port_use_and_process(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            http, grpc = free_ports(2)
            spec = msgspec.structs.replace(
                SPEC, http_port=http, grpc_port=grpc, metrics_port=taken.getsockname()[1]
            )
            message = rf"server local: metrics_port {spec.metrics_port}.*\(process {os.getpid()}\)"
            with pytest.raises(PortTaken, match=message):
                ports.check(spec)
        ports.check(spec)

    def test_whether_somebody_listens(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            assert not ports.listens("127.0.0.1", port)
            taken.listen()
            assert ports.listens("127.0.0.1", port)
        assert not ports.listens("127.0.0.1", port)


class TestFootprint:
    def test_token_of_any_server_name(self) -> None:
        token = footprint.new_token("worker_0")
        assert footprint.is_token(token)
        assert "_" not in token  # the POSIX shared memory names of the engines have no slash

    @pytest.mark.parametrize(
        "text", ["", "pdserve-", "*", "pdserve-a-*", "pdserve-a-0123456789ab/"]
    )
    def test_nothing_else_is_erased(self, text: str) -> None:
        assert not footprint.is_token(text)
        with pytest.raises(AssertionError):
            footprint.erase([text])

    def test_stale_token_of_a_dead_server(self, tmp_path: Path) -> None:
        server = Server(DEPLOYMENT, SPEC, tmp_path)
        server.folder.mkdir()
        token = footprint.new_token("local")
        (server.folder / "token").write_text(token)
        region = footprint.SHM / f"{token}-prefill-0"
        region.write_bytes(b"arena")
        assert server.pid is None
        server.clean()
        assert not region.exists()
        assert server.token is None

    def test_one_between_two_repairs_is_not_free_for_another_deployment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        theirs = Server(DEPLOYMENT, SPEC, tmp_path)
        theirs.folder.mkdir()
        (theirs.folder / "token").write_text(footprint.new_token("local"))
        records.note(theirs.folder, records.Started("/a.yaml", "/models/m", "", SPEC))
        elsewhere = msgspec.structs.replace(SPEC, http_port=1, grpc_port=2, metrics_port=3)
        ours = Server(DEPLOYMENT, elsewhere, tmp_path)
        ours.refuse_other()
        monkeypatch.setattr(watchers, "watched", lambda folder: folder == ours.folder)
        with pytest.raises(ServerError, match=r"local is being repaired, .* of /a\.yaml"):
            ours.refuse_other()
        theirs.refuse_other()

    def test_only_the_own_start_is_undone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A start that is interrupted early leaves alone what another process has started."""
        server = Server(DEPLOYMENT, SPEC, tmp_path)
        server.folder.mkdir()
        token = server.folder / "token"
        with monkeypatch.context() as patch:
            told = footprint.new_token("local")
            ended: list[Path] = []
            patch.setattr(watchers, "end", ended.append)
            server.stop(own=True)
        assert not ended, "another process's watchdog"
        token.write_text(told)
        server.stop(own=True)
        assert server.token == told
        server.stop()
        assert server.token is None

    def test_only_processes_of_the_token_end(self) -> None:
        ours, theirs = footprint.new_token("local"), footprint.new_token("local")
        sleeping = {
            token: subprocess.Popen(["sleep", "30"], env={footprint.VARIABLE: token})
            for token in (ours, theirs)
        }
        assert [process.pid for process in footprint.processes([ours])] == [sleeping[ours].pid]
        footprint.erase([ours])
        assert footprint.processes([ours]) == []
        assert psutil.pid_exists(sleeping[theirs].pid)
        sleeping[theirs].kill()
        for process in sleeping.values():
            process.wait()


class TestLog:
    def test_logs_of_the_last_starts_are_kept(self, tmp_path: Path) -> None:
        server = Server(DEPLOYMENT, SPEC, tmp_path)
        server.folder.mkdir()
        for start in range(6):
            with server._new_log() as file:
                file.write(f"{start}".encode())
        kept = {path.name: path.read_text() for path in server.folder.iterdir()}
        assert kept == {"log": "5", "log.old": "4", "log.old.2": "3", "log.old.3": "2"}

    def test_what_is_always_there_without_a_gpu_is_no_reason(self) -> None:
        text = (
            'E1122 15:37:06.12793 561 server.cc:24] "CudaDriverHelper has not been initialized."\n'
            'E1122 15:37:06.12794 561 ensemble_scheduler.cc:9] "unable to create stream for '
            'ensemble: CUDA driver version is insufficient for CUDA runtime version"\n'
            'E1122 15:37:06.12795 561 main.cc:9] "no port"\n'
        )
        assert log.relevant(text) == ['"no port"']

    def test_a_failed_model(self) -> None:
        text = (
            'E1122 15:37:06.12793 561 server.cc:24] "CudaDriverHelper has not been initialized."\n'
            "I1122 15:37:06.336612 5618 model_lifecycle.cc:839] \"successfully loaded 'good'\"\n"
            "E1122 15:37:06.497164 5618 model_lifecycle.cc:642] \"failed to load 'bad' version 1: "
            'Internal: ValueError: no weights\\n\\nAt:\\n  /m/1/model.py(4): initialize\\n"\n'
            "error: creating server: Internal - failed to load all models\n"
        )
        assert log.loaded(text) == {"good"}
        assert log.relevant(text) == [
            "model bad: Internal: ValueError: no weights",
            "At:",
            "  /m/1/model.py(4): initialize",
        ]

    def test_another_error(self) -> None:
        text = "I1122 15:37:06.1 5618 x.cc:1] hello\nerror: creating server: no such option\n"
        assert log.relevant(text) == ["creating server: no such option"]

    def test_no_error_at_all(self) -> None:
        lines = [f"line {number}" for number in range(50)]
        assert log.relevant("\n".join(lines)) == lines[-log.LINES :]


STATS = {
    "prompt_tokens": 41,
    "cached_tokens": 31,
    "output_tokens": 11,
    "attempts": 2,
    "scenario": "default",
    "group": "default",
    "prefill": "prefill_1",
    "decode": "decode_0",
    "ms": {
        "forward": 2.0,
        "prefill": 20.0,
        "transfer": 3.0,
        "exposed": 3.0,
        "ttft": 25.0,
        "e2e": 125.0,
    },
    "kv": {"bytes": 3 << 20, "transport": "shm", "strategy": "whole"},
}


class TestTimeline:
    def test_phases(self) -> None:
        found = {phase.name: phase for phase in phases(STATS)}
        assert found["forward"].note == "2 attempts, prefill_1"
        assert found["prefill"].note == "41 tokens, 31 cached"
        assert found["KV transfer"].note == "3.0 MiB, shm, whole"
        assert found["decode"].note == "100.0 tokens/s, decode_0"
        assert (found["KV transfer"].begin, found["KV transfer"].end) == (25.0, 28.0)
        assert (found["decode"].begin, found["decode"].end) == (28.0, 125.0)

    def test_a_layered_transfer_began_before_the_first_token(self) -> None:
        ms = STATS["ms"] | {"transfer": 19.0, "exposed": 2.0}  # type: ignore[operator]
        found = {phase.name: phase for phase in phases(STATS | {"ms": ms})}
        assert (found["KV transfer"].begin, found["KV transfer"].end) == (8.0, 27.0)
        assert found["decode"].begin == 27.0

    def test_an_answer_of_one_token_has_no_decode(self) -> None:
        stats = STATS | {"decode": "", "output_tokens": 1}
        assert [phase.name for phase in phases(stats)] == [
            *("forward", "prefill", "first token", "whole answer")
        ]
        assert timeline(stats).row_count == 4


def page(*series: tuple[str, str, str, float]) -> dict[str, float]:
    """Return a server's metrics of links to prefill_0 and prefill_1."""
    labels = 'prefill="{}",decode="decode_0",transport="{}",detail="{}"'
    return {
        f"pdserve_kv_link_{name}{{{labels.format(prefill, *over.split())}}}": value
        for name, prefill, over, value in series
    }


class TestLinks:
    def test_every_pair(self) -> None:
        found = links.links(
            DEPLOYMENT,
            [
                page(
                    ("bytes_per_second", "prefill_0", "shm mapped", 2.5 * 2**30),
                    ("latency_seconds", "prefill_0", "shm mapped", 2e-6),
                    ("fallback", "prefill_0", "shm mapped", 0.0),
                    ("bytes_per_second", "prefill_2", "shm mapped", 1.0),
                ),
                {'pdserve_slots{instance="decode_0"}': 1.0},
            ],
        )
        assert [(link.prefill, link.decode) for link in found] == [
            ("prefill_0", "decode_0"),
            ("prefill_1", "decode_0"),
        ]
        assert str(found[0]) == "shm (mapped)\n2.5 GiB/s, 2 us"
        assert str(found[1]) == "-", "they have no link"
        assert links.table(found).row_count == 2
        assert links.rows(found)[0]["bytes_per_second"] == 2.5 * 2**30

    def test_a_link_that_has_changed_shows_as_it_is_now(self) -> None:
        """The former state stays in the server's metrics, as zero."""
        series = page(
            ("bytes_per_second", "prefill_0", "nixl rc_mlx5/mlx5_0:1", 0.0),
            ("latency_seconds", "prefill_0", "nixl rc_mlx5/mlx5_0:1", 0.0),
            ("bytes_per_second", "prefill_0", "nixl tcp/eth0", 2**28),
            ("latency_seconds", "prefill_0", "nixl tcp/eth0", 100e-6),
            ("fallback", "prefill_0", "nixl tcp/eth0", 1.0),
            ("bytes_per_second", "prefill_0", "shm mapped", 0.0),
        )
        [link, _] = links.links(DEPLOYMENT, [series])
        assert str(link) == "nixl (tcp/eth0)\n0.25 GiB/s, 100 us, no RDMA"


def test_values_leave_out_buckets() -> None:
    page = (
        "# HELP pdserve_slots Slots\n# TYPE pdserve_slots gauge\n"
        'pdserve_slots{instance="prefill_0",state="used"} 2.000000\n'
        'pdserve_ttft_seconds_bucket{le="0.1"} 7\n'
        "pdserve_ttft_seconds_count 7\nnv_cpu_utilization 0.5\n"
    )
    assert values(page) == {
        'pdserve_slots{instance="prefill_0",state="used"}': 2.0,
        "pdserve_ttft_seconds_count": 7.0,
    }


def test_summary_of_values() -> None:
    assert summary(
        {
            'pdserve_slots{instance="prefill_0",state="used"}': 2.0,
            'pdserve_slots{instance="prefill_0",state="free"}': 0.0,
            'pdserve_ttft_seconds_sum{scenario="default"}': 0.5,
            'pdserve_ttft_seconds_count{scenario="default"}': 4.0,
            'pdserve_kv_link_latency_seconds{prefill="p",transport="shm"}': 4.7e-7,
            'pdserve_kv_link_latency_seconds{prefill="p",transport="nixl"}': 0.001254,
            'pdserve_kv_link_bytes_per_second{prefill="p",transport="shm"}': 2e9,
        }
    ) == {
        "slots": "prefill_0 used 2",
        "ttft_seconds": "default mean 125.0 ms of 4",
        "kv_link_latency_seconds": "p nixl 1254 us, p shm 0.47 us",
        "kv_link_bytes_per_second": "p shm 2000000000",
    }


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    server = Server(DEPLOYMENT, msgspec.structs.replace(SPEC, http_port=port), tmp_path)
    server.folder.mkdir()
    (server.folder / "key").write_text("key")
    assert not server.ready()
    with pytest.raises(ServerError, match="server local does not answer"):
        server.index()


class TestVersions:
    def test_one_that_is_ready_serves(self) -> None:
        assert state_of({"1": "READY", "2": "UNAVAILABLE"}) == "READY"
        assert state_of({"1": "UNAVAILABLE", "2": "LOADING"}) == "LOADING"
        assert state_of({"": ""}) == ""

    def test_each_is_shown_where_there_are_several(self) -> None:
        entry = {
            **dict.fromkeys(("http", "grpc", "metrics"), "-"),
            "server": "local",
            "state": "ready",
            "pid": None,
            "model": "/models/m",
            "engine": "torch",
            "watchdog": None,
            "unwatched": False,
            "models": {"decode_0": "READY", "decode_1": "READY"},
            "versions": {"decode_0": {"2": "READY", "3": "UNAVAILABLE"}},
            "values": {},
        }
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(page_of(entry))
        text = console.export_text()
        assert "READY (version 2 READY, version 3 UNAVAILABLE)" in text
        assert text.count("version") == 2
