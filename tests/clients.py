"""Clients of a running server for tests: HTTP, gRPC streams, metrics, and held resources."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.request
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as aio

from pdctl import footprint
from pdserve.observability.publisher import COUNTS_EVERY, PUBLISH_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import psutil

    from tests.servers import Running

TIMEOUT_S = 120.0
DTYPES = {
    "text_input": "BYTES",
    "input_ids": "INT32",
    "output_ids": "INT32",
    "chat": "BOOL",
    "exclude_input_in_output": "BOOL",
    "stream": "BOOL",
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "seed": "UINT64",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "stop_words": "BYTES",
    "ignore_eos": "BOOL",
    "scenario": "BYTES",
    "tenant": "BYTES",
    "priority": "INT32",
    "ttft_limit_ms": "INT32",
}
NUMPY = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32}


class Refused(Exception):
    """The server's only answer was an error; ``status`` is HTTP's, None over gRPC."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Part:
    """One response; ``at`` is ``time.monotonic()`` of its arrival."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stats: dict[str, Any] | None = None
    id: str = ""
    at: float = field(default_factory=time.monotonic)


@dataclass
class Answer:
    """All responses to one request."""

    parts: list[Part]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def ids(self) -> list[int]:
        return [token for part in self.parts for token in part.ids]

    @property
    def finish_reason(self) -> str:
        return self.parts[-1].finish_reason

    @property
    def stats(self) -> dict[str, Any]:
        assert self.parts[-1].stats is not None
        return self.parts[-1].stats


# --------------------------------------------------------------------------------------------- HTTP


def post(
    server: Running, path: str, body: dict[str, Any] | bytes, timeout: float = TIMEOUT_S
) -> tuple[int, dict[str, Any]]:
    """Return status and JSON answer of a POST; text that is not JSON becomes ``{"error": ...}``."""
    with closing(connect(server, timeout)) as connection:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        data = response.read()
    try:
        return response.status, json.loads(data)
    except ValueError:
        return response.status, {"error": data.decode(errors="replace")}


def connect(server: Running, timeout: float = TIMEOUT_S) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=timeout)


def generate(server: Running, model: str = "pdserve", **fields: Any) -> Answer:
    """Send ``/generate``, which has exactly one response. Raises: Refused."""
    status, answer = post(server, f"/v2/models/{model}/generate", fields)
    if status != 200:
        raise Refused(answer["error"], status)
    return Answer([_http_part(answer)])


def generate_stream(server: Running, model: str = "pdserve", **fields: Any) -> Iterator[Part]:
    """Send ``/generate_stream``; closing the iterator early closes the socket. Raises: Refused."""
    with closing(connect(server)) as connection:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(fields))
        response = connection.getresponse()
        for line in response:
            if not line.startswith(b"data: "):
                assert not line.strip(), f"not a server-sent event: {line!r}"
                continue
            answer = json.loads(line[6:].decode("utf-8", errors="strict"))
            if "error" in answer:
                raise Refused(answer["error"], response.status)
            yield _http_part(answer)


def _http_part(answer: dict[str, Any]) -> Part:
    ids = answer.get("output_ids", [])
    return Part(
        text=answer.get("text_output", ""),
        ids=ids if isinstance(ids, list) else [ids],
        finish_reason=answer.get("finish_reason", ""),
        stats=json.loads(answer["stats"]) if answer.get("stats") else None,
        id=answer.get("id", ""),
    )


# --------------------------------------------------------------------------------------------- gRPC


def tensor(name: str, value: Any) -> grpc.InferInput:
    """Return input ``name`` as [1, n]; an ``InferInput`` is returned unchanged."""
    if isinstance(value, grpc.InferInput):
        return value
    values = value if isinstance(value, (list, np.ndarray)) else [value]
    values = [one.encode() if isinstance(one, str) else one for one in values]
    array = np.array([values], dtype=NUMPY.get(DTYPES[name], np.uint64))
    return raw(name, DTYPES[name], array)


def raw(name: str, dtype: str, array: np.ndarray[Any, Any]) -> grpc.InferInput:
    """Return an input with this type and shape, whatever the server expects."""
    made = grpc.InferInput(name, list(array.shape), dtype)
    made.set_data_from_numpy(array)
    return made


@asynccontextmanager
async def connected(
    server: Running, options: list[tuple[str, int]] | None = None
) -> AsyncIterator[aio.InferenceServerClient]:
    """Make a client of the server; ``options`` are of its channel, if not the usual ones."""
    async with aio.InferenceServerClient(server.grpc, channel_args=options) as client:
        yield client


async def stream(
    client: aio.InferenceServerClient,
    model: str = "pdserve",
    *,
    request_id: str = "",
    version: str = "",
    parameters: dict[str, Any] | None = None,
    timeout: float = TIMEOUT_S,
    **inputs: Any,
) -> AsyncIterator[Part]:
    """Yield the responses of a gRPC stream; closing early cancels it. Raises: Refused."""

    async def request() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model,
            "model_version": version,
            "inputs": [tensor(name, value) for name, value in inputs.items()],
            "request_id": request_id,
            "parameters": parameters,
            "enable_empty_final_response": True,
        }

    responses = client.stream_infer(request(), stream_timeout=timeout)
    try:
        async for result, error in responses:
            if error is not None:
                raise Refused(error.message())
            if result.get_response().outputs:
                yield grpc_part(result)
    finally:
        responses.cancel()


def grpc_part(result: Any) -> Part:
    """Decode a response; every text must be valid UTF-8 on its own."""

    def text(name: str) -> str:
        values = result.as_numpy(name)
        return "" if values is None else values.reshape(-1)[0].decode("utf-8", errors="strict")

    ids = result.as_numpy("output_ids")
    return Part(
        text=text("text_output"),
        ids=[] if ids is None else ids.reshape(-1).tolist(),
        finish_reason=text("finish_reason"),
        stats=json.loads(text("stats")) if text("stats") else None,
        id=result.get_response().id,
    )


async def ask(client: aio.InferenceServerClient, model: str = "pdserve", **asked: Any) -> Answer:
    """Return the whole answer of one gRPC stream. Raises: Refused."""
    return Answer([part async for part in stream(client, model, **asked)])


# ------------------------------------------------------------------------------------------ metrics

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


def wait_counted() -> None:
    """Wait until what has been counted so far is on the servers' pages of metrics."""
    time.sleep((COUNTS_EVERY + 1) * PUBLISH_S)


def metrics(server: Running) -> list[Sample]:
    """Return every sample of the server's metrics page."""
    with urllib.request.urlopen(server.metrics, timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    found = (_SAMPLE.match(line) for line in lines)
    return [
        Sample(match[1], dict(_LABEL.findall(match[2] or "")), float(match[3]))
        for match in found
        if match
    ]


def held(server: Running) -> dict[str, float]:
    """Return what the metrics report as in use, by name and labels; empty: nothing.

    Cached ranges of an arena are not in use: prefix reuse needs them.
    """
    return {
        f"{sample.name}{sample.labels}": sample.value
        for sample in metrics(server)
        if sample.value
        and (
            sample.name == "pdserve_open_requests"
            or (sample.name in _STATES and sample.labels["state"] in _STATES[sample.name])
        )
    }


_STATES = {
    "pdserve_slots": ("used",),
    "pdserve_kv_leases": (
        *("allocated", "leased", "in_transfer", "quarantined"),
        *("computing", "waiting", "pinned"),
    ),
    "pdserve_kv_blocks": ("used",),
}


def wait_linked(server: Running, within: float = 10.0) -> None:
    """Wait until every gateway of a server knows all links between prefills and decodes."""

    def unmet() -> dict[str, float]:
        return {
            f"{sample.labels}": sample.value
            for sample in metrics(server)
            if sample.name == "pdserve_kv_links"
            if sample.labels["state"] == "unknown"
        }

    gateways = 2  # pdserve and scheduler
    wait_until(
        lambda: len(unmet()) == gateways and not any(unmet().values()), within, lambda: f"{unmet()}"
    )


def wait_idle(server: Running, within: float) -> float:
    """Return the seconds until nothing is in use; fail after ``within`` seconds."""
    began = time.monotonic()
    wait_until(lambda: not held(server), within, lambda: f"still in use: {held(server)}")
    return time.monotonic() - began


def wait_until(
    condition: Callable[[], bool], within: float, otherwise: Callable[[], str] = lambda: ""
) -> None:
    """Check ``condition`` again and again; fail after ``within`` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {otherwise()}"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------- footprint


def files(server: Running) -> dict[str, int]:
    """Return the open files of each process of the server, and its shared memory regions.

    The sockets of tritonserver are left out: 24.10 keeps that of about every twentieth gRPC
    connection that its client closes at once after an error.
    """
    tokens = [one.token for one in server.servers if one.token is not None]
    found = {}
    for process in footprint.processes(tokens):
        sockets = process.name() != "tritonserver"
        found[f"open files of {_model(process)}"] = sum(
            sockets or not target.startswith("socket:") for target in _targets(process)
        )
    regions = sum(len(footprint.regions(token)) for token in tokens)
    return {**found, "regions in /dev/shm": regions}


def stub(server: Running, model: str) -> psutil.Process:
    """Return the process that runs a model of the server."""
    tokens = [one.token for one in server.servers if one.token is not None]
    (found,) = (one for one in footprint.processes(tokens) if _model(one) == model)
    return found


def _targets(process: psutil.Process) -> Iterator[str]:
    """Return the target of each open file descriptor of a process."""
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            yield str(link.readlink())


def _model(process: psutil.Process) -> str:
    """Return the Triton model of a stub, or the name of any other process."""
    path = next((word for word in process.cmdline() if word.endswith("/model.py")), None)
    return Path(path).parts[-3] if path else process.name()


def wait_same_files(server: Running, before: dict[str, int], within: float) -> None:
    """Wait until no process has more files than ``before``; fail, naming those that have."""

    def more() -> dict[str, tuple[int, int]]:
        now = files(server)
        return {
            name: (before.get(name, 0), n) for name, n in now.items() if n > before.get(name, 0)
        }

    wait_until(lambda: not more(), within, lambda: f"before and now: {more()}")
