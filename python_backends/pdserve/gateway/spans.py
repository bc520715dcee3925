"""The spans of a request, made from its recorded history when it has ended.

::

    request                       arrival to end
    ├─ wait                       in line for a prefill, until the offer that is accepted
    ├─ offer, offer, ...          to an instance, until it answers
    ├─ prefill                    until the first token has come
    ├─ wait                       in line for a decode
    ├─ offer
    ├─ transfer                   of the KV cache, as long as the decode says that it took
    └─ decode

All but the offers follow one another without a gap; a layered transfer begins during the prefill,
and there is no wait for a decode then. When an instance fails, the span of its work is marked as an
error, and another ``wait`` follows. The work of an instance begins with the offer that it accepts,
since it reports its acceptance only if the work takes long.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pdserve import errors
from pdserve.connections import is_loopback
from pdserve.gateway.trace_context import Log, Trace, Traces
from pdserve.scheduling.request import Answer, Offer, Request, State
from pdserve.transfer.reports import NO_TRANSFER

# At shutdown, spans that have not been exported within these seconds are lost.
FLUSH_S = 2.0
# A collector that does not answer is logged once in these seconds.
LOG_S = 60.0
_IN_VAIN = {State.WAITING, State.REJECTED, State.EXPIRED, State.FAILED}
_TAKEN = {State.PREFILLING, State.TRANSFERRING, State.DECODING}
_PROPAGATOR = TraceContextTextMapPropagator()


class Phase(NamedTuple):
    """A period in which a request was in one phase. Times are ``loop.time()`` seconds."""

    name: str
    began: float
    ended: float
    attributes: dict[str, str]
    failed: bool


class RecordedTraces(Traces):
    """Traces that become spans."""

    def __init__(self, provider: TracerProvider, gateway: str, log: Log) -> None:
        super().__init__(gateway, log)
        self._provider = provider
        self._tracer = provider.get_tracer("pdserve")

    def begin(self, parameters: Mapping[str, Any]) -> Trace:
        return RecordedTrace(self._tracer, self.parent(parameters), self._gateway)

    def close(self) -> None:
        """Export the spans that are left, for FLUSH_S seconds at most."""
        flush = threading.Thread(target=self._provider.shutdown, name="flush", daemon=True)
        flush.start()
        flush.join(FLUSH_S)


class RecordedTrace(Trace):
    """A trace that becomes spans when its request ends, if it is sampled."""

    def __init__(self, tracer: Tracer, parent: str, gateway: str) -> None:
        self._tracer = tracer
        self._request: Request | None = None
        self._began = asyncio.get_running_loop().time()
        self._began_ns = time.time_ns()
        self._root = tracer.start_span(
            "request",
            _PROPAGATOR.extract({"traceparent": parent}, Context()),
            SpanKind.SERVER,
            _named({"gateway": gateway}),
            start_time=self._began_ns,
        )
        self._children = set_span_in_context(self._root, Context())
        own = self._root.get_span_context()
        ids = f"{own.trace_id:032x}-{own.span_id:016x}"
        super().__init__(f"00-{ids}-{own.trace_flags:02x}" if own.is_valid else "")

    def carry(self, request: Request) -> None:
        super().carry(request)
        self._request = request

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._root.is_recording():
            return
        ended = self._ns(asyncio.get_running_loop().time())
        outcome = _outcome(error)
        request = self._request
        # A request that could not be routed has no history.
        if request is not None and request.history:
            outcome = request.finish_reason or request.state.name.lower()
            self._root.set_attributes(_named(_told(request)))
            if request.first_token:
                self._root.add_event("first token", timestamp=self._ns(request.first_token))
            self._below(request)
        self._root.set_attributes(_named({"outcome": outcome}))
        if error is not None and outcome != "cancelled":
            ours = isinstance(error, errors.PDServeError)
            said = errors.brief(error) if ours else errors.loggable(error)
            self._root.set_status(Status(StatusCode.ERROR, said))
        self._root.end(ended)

    def _below(self, request: Request) -> None:
        attempt = 1
        for phase in phases(request):
            span = self._span(phase, phase.name, phase.attributes | {"attempt": attempt})
            if phase.failed:
                span.set_status(StatusCode.ERROR)
                attempt += 1
            span.end(self._ns(phase.ended))
        for offer in request.offers:
            told = {"instance": offer.instance, "answer": offer.answer.name.lower()}
            self._span(offer, "offer", told).end(self._ns(offer.ended))

    def _span(self, what: Phase | Offer, name: str, attributes: Mapping[str, Any]) -> Span:
        return self._tracer.start_span(
            name,
            self._children,
            attributes=_named(attributes),
            start_time=self._ns(what.began),
        )

    def _ns(self, moment: float) -> int:
        """Return nanoseconds of the wall clock, counted by the loop's, which is never set."""
        return self._began_ns + round((moment - self._began) * 1e9)


class Complaints(logging.Handler):
    """Logs OpenTelemetry's warnings, at most one every LOG_S seconds."""

    def __init__(self, gateway: str, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._gateway = gateway
        self._log = log
        self._next = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_S
            self._log(f"{self._gateway}: traces: {record.getMessage()}")


def exported(endpoint: str, gateway: str, log: Log) -> RecordedTraces:
    """Return traces that are sent to a collector, by a thread out of a bounded queue.

    OpenTelemetry's own environment variables set what the deployment does not (sampling, queue,
    headers).
    """
    complaints = logging.getLogger("opentelemetry")
    complaints.addHandler(Complaints(gateway, log))
    complaints.propagate = False
    resource = Resource.create({SERVICE_NAME: "pdserve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint, session=_session(endpoint))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RecordedTraces(provider, gateway, log)


def _session(endpoint: str) -> requests.Session | None:
    """Return a session for an exporter.

    None: OpenTelemetry's own, which reads proxies and certificates from the environment.
    """
    if not is_loopback(endpoint):
        return None
    session = requests.Session()
    session.trust_env = False
    return session


def phases(request: Request) -> Iterator[Phase]:
    """Yield the phases of a request in order, without the offers."""
    offers = deque(request.offers)
    prefill = taken = Offer("", 0.0, 0.0, Answer.ACCEPTED)
    state, began = State.WAITING, request.arrived
    arrived = max((at for at, to in request.history if to is State.DECODING), default=0.0)
    for ended, following in request.history:
        failed = following in _IN_VAIN
        while offers and offers[0].ended <= ended:
            offer = offers.popleft()
            taken = offer if offer.answer is Answer.ACCEPTED else taken
        decode = {"instance": taken.instance}
        if state is State.PREFILLING:
            yield Phase("prefill", began, ended, {"instance": prefill.instance}, failed)
            began = ended
        elif state is State.TRANSFERRING:
            until = ended
            if following is State.DECODING and ended == arrived and request.transfer is not None:
                until = min(taken.began + request.transfer.ms / 1e3, ended)
            yield Phase("transfer", taken.began, until, decode, failed)
            began = max(began, until)
        elif state is State.DECODING:
            yield Phase("decode", began, ended, decode, failed)
            began = ended
        else:
            until = taken.began if following in _TAKEN else ended
            # No request waits for a decode that has followed the prefill, or after the last token.
            if until >= began and following is not State.FINISHED:
                role = "prefill" if state is State.WAITING else "decode"
                yield Phase("wait", began, until, {"role": role}, failed)
                began = until
            prefill = taken
        state = following


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"pdserve.{name}": value for name, value in attributes.items()}


def _told(request: Request) -> dict[str, Any]:
    transfer = request.transfer or NO_TRANSFER
    return {
        "scenario": request.scenario,
        "group": request.group,
        "attempts": request.attempts,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_tokens,
        "kv.bytes": transfer.nbytes,
        "kv.transport": transfer.transport,
        "kv.strategy": transfer.strategy,
        "kv.transfer_ms": transfer.ms,
        "kv.exposed_ms": transfer.exposed_ms,
    }


def _outcome(error: BaseException | None) -> str:
    """Return the outcome of a request that has no history."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "rejected" if isinstance(error, errors.InvalidRequest | errors.NotFound) else "failed"
