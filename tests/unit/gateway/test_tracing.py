"""Tests for the spans of a request, and for the trace context that is passed on with it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pdserve import config, errors, gateway
from pdserve.gateway import spans, tracing
from pdserve.gateway.trace_context import Traces
from pdserve.rpc.messages import DecodeRequest, PrefillRequest
from pdserve.scheduling.request import FINAL, Request, State
from tests.unit.inprocess import Site, real, virtual

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
HOP_S = 0.001
# The order of spans that begin at the same moment.
ORDER = {"wait": 0, "offer": 1}


@dataclass
class Recorder:
    """A gateway's tracer whose spans are kept here; `said` collects its log messages."""

    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.traces = spans.RecordedTraces(provider, "scheduler", self.said.append)

    async def run(
        self,
        request: Request | None,
        work: Callable[[], Awaitable[Any]],
        traceparent: str = "",
    ) -> Any:
        """Trace a request as the gateway does."""
        with self.traces.begin({"traceparent": traceparent} if traceparent else {}) as trace:
            if request is not None:
                trace.carry(request)
            return await work()

    def start(self, site: Site, request: Request, traceparent: str = "") -> asyncio.Task[list[int]]:
        return asyncio.create_task(self.run(request, lambda: site.answer(request), traceparent))

    def of(self, request: Request) -> Tree:
        """Return the spans of a request that has been served."""
        return Tree([one for one in self.all() if f"{one.context.trace_id:032x}" in request.trace])

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())


@dataclass
class Tree:
    """The spans of one trace."""

    spans: list[ReadableSpan]

    def __post_init__(self) -> None:
        ids = {one.context.span_id for one in self.spans}
        [self.root] = [one for one in self.spans if not one.parent or one.parent.span_id not in ids]

    def under(self, span: ReadableSpan) -> list[ReadableSpan]:
        return sorted(
            (
                one
                for one in self.spans
                if one.parent and one.parent.span_id == span.context.span_id
            ),
            key=lambda one: (one.start_time, ORDER.get(one.name, 2)),
        )

    @property
    def lines(self) -> list[str]:
        """Return one line per span, indented below its parent; `!` marks an error."""
        return list(self._lines(self.root, ""))

    def _lines(self, span: ReadableSpan, indent: str) -> Iterator[str]:
        told = [
            str(span.attributes[f"pdserve.{name}"])
            for name in ("outcome", "role", "instance", "answer")
            if f"pdserve.{name}" in span.attributes
        ]
        yield indent + " ".join([span.name, *told, *["!"] * (not span.status.is_ok)])
        for one in self.under(span):
            yield from self._lines(one, indent + "  ")

    def check(self) -> None:
        """Check that all spans lie within the root, and that there are no gaps between phases."""
        assert len(self.under(self.root)) == len(self.spans) - 1
        for one in self.spans:
            assert self.root.start_time <= one.start_time <= one.end_time <= self.root.end_time
        for one, following in itertools.pairwise(self.phases):
            assert one.end_time == following.start_time, (one.name, following.name)
        for one, following in itertools.pairwise(self.offers):
            assert one.end_time <= following.start_time

    @property
    def phases(self) -> list[ReadableSpan]:
        return [one for one in self.under(self.root) if one.name != "offer"]

    @property
    def offers(self) -> list[ReadableSpan]:
        return [one for one in self.under(self.root) if one.name == "offer"]

    def seconds(self, name: str) -> float:
        return sum(seconds(one) for one in self.spans if one.name == name)


def seconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e9


def hops(site: Site) -> None:
    """Give every message a delay, so that no two events happen at the same moment."""
    for link in (*site.p_links, *site.d_links):
        link.delay = (HOP_S, HOP_S)


# -------------------------------------------------------------------------------------------- spans


@virtual
async def test_plain_request(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        hops(site)
        request = site.request(max_tokens=8, scenario="chat", group="chat_a")
        before = time.time_ns()
        await recorder.start(site, request, SAMPLED)
        after = time.time_ns()
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == [
            "request length",
            "  wait prefill",
            "  offer prefill_0 accepted",
            "  prefill prefill_0",
            "  wait decode",
            "  offer decode_0 accepted",
            "  transfer decode_0",
            "  decode decode_0",
        ]
        assert f"{tree.root.context.trace_id:032x}" == TRACE_ID
        assert f"{tree.root.parent.span_id:016x}" == PARENT_ID
        assert tree.root.attributes == {
            "pdserve.gateway": "scheduler",
            "pdserve.scenario": "chat",
            "pdserve.group": "chat_a",
            "pdserve.attempts": 1,
            "pdserve.prompt_tokens": 20,
            "pdserve.cached_tokens": 0,
            "pdserve.output_tokens": 8,
            "pdserve.outcome": "length",
            "pdserve.kv.bytes": site.model.layout.nbytes(20),
            "pdserve.kv.transport": "shm",
            "pdserve.kv.strategy": "whole",
            "pdserve.kv.transfer_ms": request.transfer.ms,
            "pdserve.kv.exposed_ms": request.transfer.exposed_ms,
        }
        assert before <= tree.root.start_time <= after, "the time of the wall clock"
        [event] = tree.root.events
        assert event.name == "first token"
        ttft = request.first_token - request.arrived
        assert (event.timestamp - tree.root.start_time) / 1e9 == pytest.approx(ttft, abs=1e-6)
        whole = request.ended - request.arrived
        assert seconds(tree.root) == pytest.approx(whole, abs=1e-6)
        parts = sum(map(seconds, tree.phases))
        assert parts == pytest.approx(whole, abs=1e-6), "no phase is left out"
        assert tree.seconds("prefill") == pytest.approx(0.020, abs=3 * HOP_S)
        assert tree.seconds("offer") >= 4 * HOP_S


@virtual
async def test_a_wait_shows(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, prefills=2, profile=TIMES, prefill={"slots": 1}) as site:
        hops(site)
        others = [site.start(site.request(max_tokens=2)) for _ in range(2)]
        await asyncio.sleep(3 * HOP_S)
        request = site.request(max_tokens=2)
        await recorder.start(site, request)
        await asyncio.gather(*others)
        tree = recorder.of(request)
        tree.check()
        answers = [line for line in tree.lines if "offer prefill" in line]
        assert [line.rpartition(" ")[2] for line in answers] == ["accepted"]
        wait, *_ = tree.phases
        assert wait.name == "wait"
        accepted, _ = tree.offers
        assert accepted.start_time == wait.end_time
        assert seconds(wait) > 0.015
        assert tree.root.parent is None


@virtual
async def test_recovered_request_shows_both_attempts(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        hops(site)
        request = site.request(max_tokens=30)
        task = recorder.start(site, request)
        await asyncio.sleep(0.2)
        site.d_engines[0].failures = [RuntimeError("illegal memory access")]
        assert await task == site.expected(request)
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == [
            "request length",
            "  wait prefill",
            "  offer prefill_0 accepted",
            "  prefill prefill_0",
            "  wait decode",
            "  offer decode_0 accepted",
            "  transfer decode_0",
            "  decode decode_0 !",
            "  wait prefill",
            "  offer prefill_0 accepted",
            "  prefill prefill_0",
            "  wait decode",
            "  offer decode_1 accepted",
            "  transfer decode_1",
            "  decode decode_1",
        ]
        attempts = [one.attributes["pdserve.attempt"] for one in tree.phases]
        assert attempts == [1] * 5 + [2] * 5
        assert tree.root.attributes["pdserve.attempts"] == 2
        whole = request.ended - request.arrived
        assert sum(map(seconds, tree.phases)) == pytest.approx(whole, abs=1e-6)


@virtual
async def test_prefill_that_fails_and_another(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, prefills=2, profile=TIMES) as site:
        hops(site)
        site.p_links[0].broken = "connection refused"
        site.p_engines[1].failures = [RuntimeError("out of memory")]
        request = site.request(max_tokens=2)
        await recorder.start(site, request)
        tree = recorder.of(request)
        tree.check()
        assert "  offer prefill_0 failed" in tree.lines
        assert tree.lines.count("  prefill prefill_1 !") == 1
        assert tree.lines.count("  prefill prefill_1") == 1


@virtual
async def test_request_that_fails(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        hops(site)
        request = site.request(max_tokens=50)
        task = recorder.start(site, request)
        await asyncio.sleep(0.2)
        site.d_links[0].break_("connection reset")
        with pytest.raises(errors.PDServeError) as caught:
            await task
        tree = recorder.of(request)
        tree.check()
        assert tree.lines[0] == "request failed !"
        assert tree.root.status.description == str(caught.value)
        assert tree.lines.count("  decode decode_0 !") == 1


@virtual
async def test_request_that_expires(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES, prefill={"slots": 1}) as site:
        hops(site)
        other = site.start(site.request(3000, max_tokens=200))
        await asyncio.sleep(3 * HOP_S)
        site.p_engines[0].failures = []
        request = site.request(ttft_limit_s=0.01)
        with pytest.raises(errors.Late, match="no idle prefill"):
            await recorder.start(site, request)
        await other
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == [
            "request expired !",
            "  wait prefill !",
        ]


@pytest.mark.parametrize(
    ("after", "lines"),
    [
        (HOP_S / 2, ["  wait prefill", "  offer prefill_0 failed"]),
        (0.01, ["  wait prefill", "  offer prefill_0 accepted", "  prefill prefill_0"]),
        (
            0.1,
            [
                "  wait prefill",
                "  offer prefill_0 accepted",
                "  prefill prefill_0",
                "  wait decode",
                "  offer decode_0 accepted",
                "  transfer decode_0",
                "  decode decode_0",
            ],
        ),
    ],
)
@virtual
async def test_cancelled_request(tmp_path: Path, after: float, lines: list[str]) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        hops(site)
        request = site.request(max_tokens=100)
        task = recorder.start(site, request)
        await asyncio.sleep(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == ["request cancelled", *lines], "a cancelled request is no error"
        assert seconds(tree.root) == pytest.approx(after, abs=1e-6)


@virtual
async def test_first_token_that_is_the_last(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        hops(site)
        request = site.request(max_tokens=1)
        await recorder.start(site, request)
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == [
            "request length",
            "  wait prefill",
            "  offer prefill_0 accepted",
            "  prefill prefill_0",
        ]


@virtual
async def test_prompt_that_a_decode_computes(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES, gateway={"local": "on"}) as site:
        hops(site)
        request = site.request(max_tokens=4)
        await recorder.start(site, request)
        tree = recorder.of(request)
        tree.check()
        assert tree.lines == [
            "request length",
            "  wait prefill",
            "  offer decode_0 accepted",
            "  decode decode_0",
        ]


@real
async def test_decode_that_follows_the_prefill(tmp_path: Path) -> None:
    recorder = Recorder()
    profile = {"layers": 8, "prefill": {"base_ms": 40.0}, "decode": {"base_ms": 2.0}}
    async with Site(tmp_path, profile=profile, layered=True) as site:
        request = site.request(600, max_tokens=4)
        await recorder.start(site, request)
        tree = recorder.of(request)
        assert tree.lines == [
            "request length",
            "  wait prefill",
            "  offer prefill_0 accepted",
            "  prefill prefill_0",
            "  offer decode_0 accepted",
            "  transfer decode_0",
            "  decode decode_0",
        ]
        wait, prefill, transfer, decode = tree.phases
        assert prefill.start_time < transfer.start_time < prefill.end_time
        assert wait.end_time == prefill.start_time
        assert max(prefill.end_time, transfer.end_time) == decode.start_time
        assert decode.end_time <= tree.root.end_time
        kv = {name: tree.root.attributes[f"pdserve.kv.{name}"] for name in ("strategy", "bytes")}
        assert kv == {"strategy": "layered", "bytes": site.model.layout.nbytes(600)}
        took = tree.root.attributes["pdserve.kv.transfer_ms"]
        assert seconds(transfer) == pytest.approx(took / 1e3, abs=1e-6)


@virtual
async def test_request_that_is_refused_at_the_door() -> None:
    recorder = Recorder()

    async def refuse() -> None:
        await asyncio.sleep(0.001)
        raise errors.InvalidRequest("top_k: -1; allowed: from 0 to 16777216")

    with pytest.raises(errors.InvalidRequest):
        await recorder.run(None, refuse, SAMPLED)
    [root] = recorder.all()
    assert Tree([root]).lines == ["request rejected !"]
    assert root.status.description == "top_k: -1; allowed: from 0 to 16777216"
    assert f"{root.context.trace_id:032x}" == TRACE_ID


@virtual
async def test_a_span_tells_nothing_of_a_prompt_that_an_exception_quotes() -> None:
    recorder = Recorder()

    async def fail() -> None:
        raise KeyError("a prompt of another tenant")

    with pytest.raises(KeyError):
        await recorder.run(None, fail, SAMPLED)
    [root] = recorder.all()
    assert root.status.description is not None
    assert root.status.description.startswith("KeyError (")
    assert "tenant" not in root.status.description


@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_every_request_has_one_whole_tree(tmp_path: Path, seed: int) -> None:
    """A trace has no gap, no overlap and one outcome, whatever fails, breaks or is cancelled."""
    recorder = Recorder()
    rng = random.Random(seed)
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES, seed=seed) as site:
        for link in (*site.p_links, *site.d_links):
            link.delay = (HOP_S, 3 * HOP_S)
        requests = [site.request(rng.randrange(1, 300), max_tokens=20) for _ in range(60)]
        tasks = []
        for request in requests:
            tasks.append(recorder.start(site, request))
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.uniform(0.001, 0.2), tasks[-1].cancel)
            if rng.random() < 0.2:
                engine = rng.choice([*site.p_engines, *site.d_engines])
                engine.failures.append(RuntimeError("broken kernel"))
            if rng.random() < 0.1:
                link = rng.choice([*site.p_links, *site.d_links])
                link.break_("connection reset")
                link.broken = None
            await asyncio.sleep(rng.expovariate(1 / 0.02))
        await asyncio.gather(*tasks, return_exceptions=True)
    outcomes: Counter[str] = Counter()
    for request in requests:
        assert request.state in FINAL
        tree = recorder.of(request)
        tree.check()
        whole = request.ended - request.arrived
        assert sum(map(seconds, tree.phases)) == pytest.approx(whole, abs=1e-6)
        names = Counter(one.name for one in tree.spans)
        assert names["offer"] == len(request.offers)
        waited = [state for _, state in request.history].count(State.WAITING)
        assert sum("!" in line for line in tree.lines[1:]) == waited + (
            request.state not in (State.FINISHED, State.CANCELLED)
        )
        outcome = tree.root.attributes["pdserve.outcome"]
        assert outcome == (request.finish_reason or request.state.name.lower())
        outcomes[outcome] += 1
    assert {"length", "cancelled"} <= outcomes.keys()
    assert any(request.attempts > 1 for request in requests)


# ------------------------------------------------------------------------------------------ context


@virtual
async def test_every_call_carries_the_context(tmp_path: Path) -> None:
    """A call carries the client's trace id, and the span id of the request."""
    recorder = Recorder()
    async with Site(tmp_path, decodes=2, profile=TIMES) as site:
        request = site.request(max_tokens=30)
        task = recorder.start(site, request, SAMPLED)
        await asyncio.sleep(0.2)
        site.d_engines[0].failures = [RuntimeError("illegal memory access")]
        await task
        root = recorder.of(request).root
        expected = f"00-{TRACE_ID}-{root.context.span_id:016x}-01"
        asked = [
            *site.p_links[0].of(PrefillRequest),
            *site.d_links[0].of(DecodeRequest),
            *site.d_links[1].of(DecodeRequest),
        ]
        assert [one.trace for one in asked] == [expected] * 4


@virtual
async def test_client_that_does_not_sample(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request()
        await recorder.start(site, request, UNSAMPLED)
        [asked] = site.p_links[0].of(PrefillRequest)
        assert asked.trace.startswith(f"00-{TRACE_ID}-")
        assert asked.trace.endswith("-00")
        assert PARENT_ID not in asked.trace
        assert recorder.all() == []


@virtual
async def test_sampling_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable decides for requests without a trace context; a context decides for itself."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        await recorder.start(site, site.request())
        assert recorder.all() == []
        await recorder.start(site, site.request(), SAMPLED)
        assert Tree(recorder.all()).lines[0] == "request length"


@virtual
async def test_without_a_collector_it_is_passed_on(tmp_path: Path) -> None:
    traces = tracing.start(None, "scheduler", pytest.fail)
    async with Site(tmp_path, profile=TIMES) as site:
        for given, expected in (({"traceparent": SAMPLED}, SAMPLED), ({}, "")):
            request = site.request()
            with traces.begin(given) as trace:
                trace.carry(request)
                await site.answer(request)
            asked = [*site.p_links[0].of(PrefillRequest), *site.d_links[0].of(DecodeRequest)]
            assert {one.trace for one in asked if one.prompt == request.prompt} == {expected}
    traces.close()


@pytest.mark.parametrize(
    "given",
    [
        SAMPLED,
        UNSAMPLED,
        f"00-{TRACE_ID}-{PARENT_ID}-03",
        f"00-{TRACE_ID}-{PARENT_ID}-ff",
    ],
)
def test_valid_traceparents(given: str) -> None:
    traces = Traces("pdserve", pytest.fail)
    assert traces.parent({"traceparent": given}) == given


@pytest.mark.parametrize("more", ["", "-", "-what-may-come"])
def test_later_version_is_read_as_far_as_it_is_known(more: str) -> None:
    traces = Traces("pdserve", pytest.fail)
    assert traces.parent({"traceparent": f"cc{SAMPLED[2:]}{more}"}) == SAMPLED


@pytest.mark.parametrize(
    "given",
    [
        "hello",
        SAMPLED.upper(),
        SAMPLED[:-1],
        f"{SAMPLED}0",
        f"{SAMPLED}\n",
        f"{SAMPLED}-00",
        f"cc{SAMPLED[2:]}0",
        f"ff{SAMPLED[2:]}",
        f"0g{SAMPLED[2:]}",
        f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-0x",
        f"00_{TRACE_ID}-{PARENT_ID}-01",
        "0" * 1_000_000,
        7,
        True,
    ],
)
def test_invalid_traceparent_is_ignored_and_said_once(given: Any) -> None:
    said: list[str] = []
    traces = Traces("pdserve", said.append)
    assert traces.parent({"traceparent": given}) == ""
    assert traces.parent({"traceparent": "another"}) == ""
    [line] = said
    assert line.startswith("pdserve: traceparent: ")
    assert len(line) < 200
    assert traces.parent({"traceparent": SAMPLED}) == SAMPLED


@pytest.mark.parametrize("given", [{}, {"traceparent": ""}, {"traceparent": None}])
def test_a_missing_traceparent_is_not_invalid(given: dict[str, Any]) -> None:
    assert Traces("pdserve", pytest.fail).parent(given) == ""


@virtual
async def test_invalid_traceparent_begins_a_trace_of_its_own(tmp_path: Path) -> None:
    recorder = Recorder()
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request()
        await recorder.start(site, request, SAMPLED.upper())
        assert recorder.of(request).root.parent is None
        assert TRACE_ID not in request.trace


# ----------------------------------------------------------------------------------------- exporter


@pytest.fixture
def unreachable() -> Iterator[str]:
    """Return the address of a collector that is not there; reset OpenTelemetry's log at the end."""
    logger = logging.getLogger("opentelemetry")
    before = logger.handlers[:], logger.propagate
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces"
    logger.handlers[:], logger.propagate = before


@real
async def test_unreachable_collector_costs_a_line(
    unreachable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The queue overflows, and several batches cannot be delivered."""
    for name, value in (
        ("SCHEDULE_DELAY", 10),
        ("MAX_QUEUE_SIZE", 64),
        ("MAX_EXPORT_BATCH_SIZE", 8),
    ):
        monkeypatch.setenv(f"OTEL_BSP_{name}", str(value))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    said: list[str] = []
    others = set(threading.enumerate())
    traces = tracing.start(unreachable, "scheduler", said.append)
    async with Site(tmp_path) as site:
        requests = [site.request(max_tokens=2) for _ in range(50)]
        for request in requests:
            with traces.begin({}) as trace:
                trace.carry(request)
                assert await site.answer(request) == site.expected(request)
        await asyncio.sleep(0.3)
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < spans.FLUSH_S + 0.5
    # the exporter may still retry, and has files of its own open
    for thread in set(threading.enumerate()) - others:
        thread.join()
    [line] = said
    assert line.startswith("scheduler: traces: ")


@pytest.mark.usefixtures("unreachable")
def test_complaints_come_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said: list[str] = []
    logger = logging.getLogger("opentelemetry.exporter")
    logging.getLogger("opentelemetry").addHandler(spans.Complaints("pdserve", said.append))
    for now in (100.0, 110.0, 100.0 + spans.LOG_S, 101.0 + spans.LOG_S):
        logger.warning("no answer at %s", now)
        logger.info("of no interest")
    assert said == ["pdserve: traces: no answer at 100.0", "pdserve: traces: no answer at 160.0"]


@pytest.mark.usefixtures("unreachable")
def test_service_name_is_ours_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> Any:
        traces = spans.exported("http://127.0.0.1:1/v1/traces", "pdserve", lambda line: None)
        with contextlib.closing(traces):
            return traces._provider.resource.attributes["service.name"]

    assert name() == "pdserve"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm")
    assert name() == "llm"


def test_deployment_that_wants_traces_without_opentelemetry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(gateway, "spans")
    monkeypatch.delitem(sys.modules, "pdserve.gateway.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(errors.DeploymentError, match=r"gateway\.traces: .*'pdserve\[traces\]'"):
        tracing.start("http://127.0.0.1:4318/v1/traces", "pdserve", pytest.fail)


def test_nothing_of_opentelemetry_is_imported_unless_needed() -> None:
    code = (
        "import sys; from pdserve.gateway import tracing; tracing.start(None, 'pdserve', print); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("traces", [None, "http://127.0.0.1:4318/v1/traces", "https://collector"])
def test_address_in_the_deployment(traces: str | None) -> None:
    assert msgspec.convert({"traces": traces}, config.Gateway).traces == traces


@pytest.mark.parametrize("traces", ["", "127.0.0.1:4318", "grpc://collector:4317", "http://", 4318])
def test_wrong_address_is_refused_by_name(traces: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.traces"):
        msgspec.convert({"traces": traces}, config.Gateway)
