"""Tests for the spans of a real server's requests, as a collector receives them."""

from __future__ import annotations

import asyncio
import queue
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import tritonclient.grpc as grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pdctl import fleet
from pdserve.config import Gateway
from tests.clients import Refused, ask, connected, generate, tensor, wait_linked, wait_until
from tests.servers import Running, emulated_deployment, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.triton

PARENT_ID = "00f067aa0ba902b7"
PROFILE = {"prefill": {"base_ms": 20}, "decode": {"base_ms": 5}}
ASKED = {"text_input": "Hello", "max_tokens": 4, "ignore_eos": True}
PLAIN = ["decode", "offer", "offer", "prefill", "request", "transfer", "wait", "wait"]


@dataclass
class Collector:
    """An OTLP/HTTP collector, which keeps the spans it receives."""

    address: str = ""
    services: set[str] = field(default_factory=set)
    spans: list[Any] = field(default_factory=list)

    def of(self, trace_id: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]

    def wait(self, trace_id: str, count: int) -> dict[str, list[Any]]:
        """Wait until this many spans of a trace have come; return them by name."""
        wait_until(lambda: len(self.of(trace_id)) >= count, 10, lambda: self.of(trace_id))
        found: dict[str, list[Any]] = {}
        for span in self.of(trace_id):
            found.setdefault(span.name, []).append(span)
        return found

    def take(self, data: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.address = f"http://127.0.0.1:{server.server_port}/v1/traces"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield collector
        server.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with traced(tmp_path_factory.mktemp("traces"), collector) as server:
            yield server


@contextmanager
def traced(folder: Path, collector: Collector) -> Iterator[Running]:
    gateway = Gateway(traces=collector.address)
    with running(emulated_deployment(folder, PROFILE, gateway=gateway), folder) as server:
        wait_linked(server)  # connecting takes offers of its own
        yield server


def attributes(of: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in of.attributes}


def traceparent(trace_id: str, flags: str = "01") -> str:
    return f"00-{trace_id}-{PARENT_ID}-{flags}"


def trace_id(number: int) -> str:
    return f"{number:032x}"


def by_metadata(server: Running, value: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with closing(grpc.InferenceServerClient(server.grpc)) as client:
        client.start_stream(
            lambda result, error: answers.put(error), headers={"traceparent": value}
        )
        client.async_stream_infer("pdserve", [tensor(name, one) for name, one in ASKED.items()])
        assert answers.get(timeout=30) is None
        client.stop_stream()


def test_spans_of_a_request_are_in_the_clients_trace(server: Running, collector: Collector) -> None:
    answer = generate(server, **ASKED, parameters={"traceparent": traceparent(trace_id(1))})
    spans = collector.wait(trace_id(1), 8)
    assert sorted(name for name, found in spans.items() for _ in found) == PLAIN
    [root] = spans["request"]
    assert root.parent_span_id.hex() == PARENT_ID
    below = [span for found in spans.values() for span in found if span is not root]
    assert {span.parent_span_id for span in below} == {root.span_id}
    for span in below:
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano
    told = attributes(root)
    assert told["pdserve.gateway"] == "pdserve"
    assert told["pdserve.outcome"] == "length"
    assert told["pdserve.output_tokens"] == 4
    assert told["pdserve.group"] == answer.stats["group"]
    assert attributes(spans["prefill"][0])["pdserve.instance"] == answer.stats["prefill"]
    assert attributes(spans["decode"][0])["pdserve.instance"] == answer.stats["decode"]
    ms = (root.end_time_unix_nano - root.start_time_unix_nano) / 1e6
    assert ms >= answer.stats["ms"]["e2e"]
    [prefill] = spans["prefill"]
    ms = (prefill.end_time_unix_nano - prefill.start_time_unix_nano) / 1e6
    assert 20 <= ms <= answer.stats["ms"]["ttft"]
    assert collector.services == {"pdserve"}


@pytest.mark.parametrize("field", [True, False], ids=["field", "parameter"])
def test_over_http(server: Running, collector: Collector, field: bool) -> None:
    """server#8790: ``generate`` drops headers, but passes unknown fields as parameters."""
    given = {"traceparent": traceparent(trace_id(2 + field))}
    generate(server, **ASKED, **(given if field else {"parameters": given}))
    collector.wait(trace_id(2 + field), 8)


def test_grpc_metadata(server: Running, collector: Collector) -> None:
    by_metadata(server, traceparent(trace_id(4)))
    collector.wait(trace_id(4), 8)


def test_grpc_parameter_of_the_scheduler(server: Running, collector: Collector) -> None:
    async def run() -> None:
        async with connected(server) as client:
            asked = {"input_ids": [5] * 8, "max_tokens": 2, "ignore_eos": True}
            parameters = {"traceparent": traceparent(trace_id(5))}
            await ask(client, "scheduler", parameters=parameters, **asked)

    asyncio.run(run())
    [root] = collector.wait(trace_id(5), 8)["request"]
    assert attributes(root)["pdserve.gateway"] == "scheduler"


def test_through_the_ensemble(server: Running, collector: Collector) -> None:
    generate(server, "ensemble", **ASKED, parameters={"traceparent": traceparent(trace_id(10))})
    [root] = collector.wait(trace_id(10), 8)["request"]
    assert attributes(root)["pdserve.gateway"] == "scheduler"


def test_refused_request(server: Running, collector: Collector) -> None:
    given = {"traceparent": traceparent(trace_id(6))}
    with pytest.raises(Refused, match="temperature") as caught:
        generate(server, **ASKED, temperature=-1.0, parameters=given)
    [root] = collector.wait(trace_id(6), 1)["request"]
    assert attributes(root)["pdserve.outcome"] == "rejected"
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert root.status.message in str(caught.value)


def test_invalid_traceparent_is_ignored(server: Running) -> None:
    """The standard says that the request continues in a new trace."""
    warning = "pdserve: traceparent: '00-nonsense' is invalid"
    generate(server, **ASKED, parameters={"traceparent": "00-nonsense"})
    wait_until(lambda: warning in server.servers[0].read_log(), 2)
    generate(server, **ASKED, parameters={"traceparent": "00-nonsense"})
    assert server.servers[0].read_log().count(warning) == 1


def test_unsampled_request_leaves_no_spans(server: Running, collector: Collector) -> None:
    generate(server, **ASKED, parameters={"traceparent": traceparent(trace_id(7), "00")})
    generate(server, **ASKED, parameters={"traceparent": traceparent(trace_id(8))})
    collector.wait(trace_id(8), 8)
    assert collector.of(trace_id(7)) == []


def test_server_that_stops_hands_over_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with collecting() as collector, traced(tmp_path, collector) as server:
        generate(server, **ASKED, parameters={"traceparent": traceparent(trace_id(9))})
        assert collector.spans == []
        fleet.stop(server.servers)
        assert len(collector.of(trace_id(9))) == 8
