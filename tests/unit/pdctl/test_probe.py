"""Tests for ``pdctl probe``, with real gRPC servers that answer like a gateway or stay silent."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdctl import cli
from tests.servers import free_ports

STATS = {"prefill": "prefill_1", "decode": "decode_0"}
Answer = Callable[[Any], Any]


class Gateway(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A gateway that answers the first request of each stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802 - gRPC's
        for request in requests:
            self.asked.append(request)
            yield self.answer(request)


def answered(request: Any) -> Any:
    made = service_pb2.ModelStreamInferResponse()
    for name, data in (("text_output", "a b"), ("finish_reason", "length"), ("stats", STATS)):
        text = (data if isinstance(data, str) else json.dumps(data)).encode()
        made.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
        made.infer_response.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
    return made


def refused(request: Any) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message="UNAVAILABLE: no idle prefill")


@pytest.fixture
def serving() -> Iterator[Callable[[Answer], tuple[Gateway, int]]]:
    """Start a server with such a gateway; yield the gateway and its port."""
    with ThreadPoolExecutor(4) as pool:
        started = []

        def start(answer: Answer) -> tuple[Gateway, int]:
            gateway, server = Gateway(answer), grpc.server(pool)
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(gateway, server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            started.append(server)
            return gateway, port

        yield start
        for server in started:
            server.stop(None).wait()


class CommandLine:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.file = folder / "deployment.yaml"
        self._patch, self._capsys = monkeypatch, capsys

    def deployment(self, *ports: int) -> None:
        """Write a deployment of a gateway at each port, and a worker."""
        servers = [f"name: g{n}, grpc_port: {port}" for n, port in enumerate(ports)]
        servers.append("name: worker, gateway: false, prefill: [p], decode: [d]")
        free = iter(free_ports(2 * len(servers)))
        lines = [
            f"  - {{{server}, http_port: {next(free)}, metrics_port: {next(free)}}}"
            for server in servers
        ]
        self.file.write_text("\n".join(["model: m", "servers:", *lines]))

    def run(self, *options: str) -> tuple[int, str, str]:
        """Return exit status, output and errors."""
        arguments = ["pdctl", "probe", "--file", str(self.file), *options]
        self._patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as raised:
            cli.main()
        return raised.value.code or 0, *self._capsys.readouterr()


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_all_answer(command_line: CommandLine, serving: Any) -> None:
    gateway, port = serving(answered)
    command_line.deployment(port, serving(answered)[1])
    code, output, _ = command_line.run()
    assert code == 0
    first, second = output.splitlines()
    assert first.startswith("g0 answers: ")
    assert first.endswith(" ms, prefill_1 and decode_0")
    assert second.startswith("g1 answers: ")
    (request,) = gateway.asked
    given = dict(zip((one.name for one in request.inputs), request.raw_input_contents, strict=True))
    assert given["max_tokens"] == b"\2\0\0\0", "one token of a prefill, one of a decode"
    assert given["ignore_eos"] == b"\1"
    assert given["tenant"] == b"\5\0\0\0probe"
    assert int.from_bytes(given["priority"], "little") > 0
    assert int.from_bytes(given["ttft_limit_ms"], "little") == 10_000


def test_one_refuses(command_line: CommandLine, serving: Any) -> None:
    port = serving(refused)[1]
    command_line.deployment(serving(answered)[1], port)
    code, output, _ = command_line.run()
    assert code == cli.NOT_READY
    assert output.splitlines()[1] == f"g1 (127.0.0.1:{port}): UNAVAILABLE: no idle prefill"
    assert command_line.run("--server", "g0")[0] == 0


def test_one_is_silent(command_line: CommandLine, serving: Any) -> None:
    asked = threading.Event()

    def silent(request: Any) -> Any:
        asked.wait(10)
        return answered(request)

    command_line.deployment(serving(silent)[1])
    code, output, _ = command_line.run("--json", "--timeout", "0.3")
    asked.set()
    assert code == cli.NOT_READY
    (row,) = json.loads(output)
    assert row["error"] == "no answer within 0.3 s"
    assert (row["ok"], row["prefill"], row["decode"]) == (False, "", "")
    assert 300 <= row["ms"] < 5000


def test_nobody_listens(command_line: CommandLine) -> None:
    command_line.deployment(*free_ports(1))
    code, output, _ = command_line.run()
    assert code == cli.NOT_READY
    assert "UNAVAILABLE" in output


def test_a_worker_cannot_be_probed(command_line: CommandLine) -> None:
    command_line.deployment(*free_ports(1))
    code, _, errors = command_line.run("--server", "worker")
    assert (code, errors) == (1, "pdctl: no gateway to probe: worker has gateway: false\n")
