"""Tests for clients that leave: whatever they held is free at once, in every phase."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import queue
import random
import re
import time
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import tritonclient.grpc as grpc
from grpc.aio import AioRpcError

from pdserve.config import Decode, Gateway, Prefill
from tests.clients import (
    Part,
    Refused,
    connect,
    connected,
    files,
    generate,
    held,
    metrics,
    stream,
    tensor,
    wait_idle,
    wait_linked,
    wait_same_files,
    wait_until,
)
from tests.servers import Running, emulated_deployment, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import tritonclient.grpc.aio as aio

pytestmark = [pytest.mark.triton, pytest.mark.alone]

FREED_S = 0.2
"""The time that the design promises for a cancel."""
SHOWN_S = 0.25 + 0.1
"""Metrics are published four times a second, and gauges of a decode are set ten times."""
STEP_S = 0.02
PREFILL_TOKEN_S = 0.01
LONG = 160
"""Tokens of a prompt that takes some time to compute."""


class Client(Protocol):
    """One streaming request to the scheduler, which its client can leave."""

    def __init__(self, server: Running, model: str = "", **inputs: Any) -> None: ...

    def token(self) -> float:
        """Wait for the next response; return when it came."""

    def leave(self) -> float:
        """Leave without a message; return when that was."""


class GrpcCancel:
    """A client that cancels its stream."""

    timeout: float | None = None
    model = "scheduler"

    def __init__(self, server: Running, model: str = "", **inputs: Any) -> None:
        self._arrived: queue.Queue[tuple[float, Any]] = queue.Queue()
        self._client = grpc.InferenceServerClient(server.grpc)
        self._client.start_stream(
            lambda result, error: self._arrived.put((time.monotonic(), error)),
            stream_timeout=self.timeout,
        )
        tensors = [tensor(name, value) for name, value in _streamed(inputs).items()]
        self._client.async_stream_infer(model or self.model, tensors)

    def token(self) -> float:
        at, error = self._arrived.get(timeout=30)
        assert error is None, error
        return at

    def leave(self) -> float:
        at = time.monotonic()
        self._client.stop_stream(cancel_requests=True)
        self._client.close()
        return at


class OtherGatewayClient(GrpcCancel):
    """A client of the second gateway, which promises the same room independently of the first."""

    model = "pdserve"


class GrpcTimeout(GrpcCancel):
    """A client that leaves when its own timeout ends."""

    timeout = 1.0

    def leave(self) -> float:
        while True:
            at, error = self._arrived.get(timeout=30)
            if error is not None:
                assert "Deadline Exceeded" in str(error)
                super().leave()
                return at


class HttpClose:
    """A client that closes its socket in the middle of ``generate_stream``."""

    def __init__(self, server: Running, model: str = "scheduler", **inputs: Any) -> None:
        self._connection = connect(server)
        self._connection.request(
            "POST", f"/v2/models/{model}/generate_stream", json.dumps(_streamed(inputs))
        )
        self._response: Any = None

    def token(self) -> float:
        self._response = self._response or self._connection.getresponse()
        line = self._response.readline()
        assert line.startswith(b"data: {"), line
        assert not self._response.readline().strip()
        return time.monotonic()

    def leave(self) -> float:
        if self._response is not None:
            self._response.close()
        self._connection.close()
        return time.monotonic()


def _streamed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"stream": True, "max_tokens": 500, **inputs}


WAYS = pytest.mark.parametrize("way", [GrpcCancel, HttpClose, GrpcTimeout])


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One prefill and one decode with one slot each; 10 ms per prompt token, 20 ms per step."""
    with serving(tmp_path_factory.mktemp("one_slot"), decode_slots=1) as server:
        yield server


@pytest.fixture(scope="module")
def two_answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same, but the decode has room for two of the longest answers."""
    with serving(tmp_path_factory.mktemp("two_answers"), decode_slots=2) as server:
        yield server


@contextlib.contextmanager
def serving(folder: Path, decode_slots: int) -> Iterator[Running]:
    deployment = emulated_deployment(
        folder,
        {
            "prefill": {"per_token_ms": PREFILL_TOKEN_S * 1e3},
            "decode": {"base_ms": STEP_S * 1e3},
        },
        prefill=Prefill(slots=1, arena_mib=16),
        decode=Decode(slots=decode_slots, blocks=64),
        gateway=Gateway(ttft_limit_ms=20_000),
    )
    with running(deployment, folder) as server:
        yield server


@pytest.fixture(autouse=True)
def idle_at_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"one_slot", "two_answers"} & set(request.fixturenames):
        wait_idle(request.getfixturevalue(name), 2)


_numbers = itertools.count()


def prompt(tokens: int) -> list[int]:
    """Return token ids that share no prefix with other prompts here, so none is cached."""
    return [100, next(_numbers), *range(200, 200 + tokens - 2)]


def shown_in_use(server: Running, name: str, **labels: str) -> bool:
    """Tell whether the metrics show this in use."""
    wanted = str(labels)[1:-1]
    return any(key.startswith(name) and wanted in key for key in held(server))


# --------------------------------------------------------------------------- one client that leaves


@WAYS
def test_in_decode(one_slot: Running, way: type[Client]) -> None:
    leaving = way(one_slot, input_ids=prompt(5))
    leaving.token()
    leaving.token()
    staying = GrpcCancel(one_slot, input_ids=prompt(5))
    wait_until(lambda: open_requests(one_slot) == 2, 1)
    wait_until(lambda: shown_in_use(one_slot, "pdserve_kv_blocks"), 1)

    left = leaving.leave()
    # The only slot of the decode goes to the waiting request: that is when it was free.
    staying.token()
    freed = staying.token() - left - 5 * PREFILL_TOKEN_S - STEP_S
    staying.leave()

    print(f"free after {freed * 1e3:.0f} ms")
    assert freed < FREED_S
    wait_idle(one_slot, FREED_S + SHOWN_S)


@WAYS
def test_while_its_kv_cache_waits_for_a_decode(two_answers: Running, way: type[Client]) -> None:
    """Its gateway has just been notified of room, all of which the other one has used since."""
    generate(two_answers, text_input="first", max_tokens=2)
    generate(two_answers, "scheduler", input_ids=prompt(5), max_tokens=2)
    others = [OtherGatewayClient(two_answers, text_input=text) for text in ("second", "third")]
    for client in others:
        client.token()
        client.token()
    leaving = way(two_answers, input_ids=prompt(5))
    leaving.token()
    staying = GrpcCancel(two_answers, input_ids=prompt(5), max_tokens=1)
    wait_until(lambda: shown_in_use(two_answers, "pdserve_kv_leases", state="leased"), 1)

    left = leaving.leave()
    # Likewise the only slot of the prefill, which an untransferred KV cache keeps.
    freed = staying.token() - left - 5 * PREFILL_TOKEN_S
    for client in (*others, staying):
        client.leave()

    print(f"free after {freed * 1e3:.0f} ms")
    assert freed < FREED_S


@pytest.mark.parametrize("way", [GrpcCancel, GrpcTimeout])
def test_while_waiting_for_room_in_a_decode(one_slot: Running, way: type[Client]) -> None:
    """Nothing is computed for it, and others can use the prefill."""
    decoding = GrpcCancel(one_slot, input_ids=prompt(5))
    decoding.token()
    decoding.token()
    leaving = way(one_slot, input_ids=prompt(5))
    wait_until(lambda: open_requests(one_slot) == 2, 1)
    generate(one_slot, "scheduler", input_ids=prompt(5), max_tokens=1)

    left = leaving.leave()
    wait_until(lambda: open_requests(one_slot) == 1, 1)
    noticed = time.monotonic() - left
    decoding.leave()

    print(f"shown after {noticed * 1e3:.0f} ms")
    assert noticed < FREED_S + SHOWN_S


@WAYS
def test_in_prefill(one_slot: Running, way: type[Client]) -> None:
    """A forward is never interrupted, so the slot is free when it ends."""
    began = time.monotonic()
    leaving = way(one_slot, input_ids=prompt(LONG))
    wait_until(lambda: shown_in_use(one_slot, "pdserve_kv_leases", state="allocated"), 1.5)
    staying = GrpcCancel(one_slot, input_ids=prompt(5))

    left = leaving.leave()
    forward_ends = began + LONG * PREFILL_TOKEN_S
    assert left < forward_ends
    freed = staying.token() - forward_ends - 5 * PREFILL_TOKEN_S
    staying.leave()

    print(f"free after {freed * 1e3:.0f} ms")
    assert freed < FREED_S


@pytest.mark.parametrize("way", [GrpcCancel, GrpcTimeout])
def test_while_waiting_for_a_prefill(one_slot: Running, way: type[Client]) -> None:
    busy = GrpcCancel(one_slot, input_ids=prompt(LONG))
    leaving = way(one_slot, input_ids=prompt(5))
    wait_until(lambda: open_requests(one_slot) == 2, 1)

    left = leaving.leave()
    wait_until(lambda: open_requests(one_slot) == 1, 1)
    noticed = time.monotonic() - left
    busy.token()
    busy.leave()

    print(f"shown after {noticed * 1e3:.0f} ms")
    assert noticed < FREED_S + SHOWN_S


def test_over_http_with_its_first_response_at_the_latest(one_slot: Running) -> None:
    """Triton does not look at the socket of a request that has had no response."""
    busy = GrpcCancel(one_slot, input_ids=prompt(LONG))
    leaving = HttpClose(one_slot, input_ids=prompt(5))
    wait_until(lambda: open_requests(one_slot) == 2, 1)

    leaving.leave()
    busy.token()
    busy.leave()

    wait_idle(one_slot, 5 * PREFILL_TOKEN_S + FREED_S + SHOWN_S)


@pytest.mark.parametrize("way", [GrpcCancel, HttpClose])
def test_through_the_ensemble_it_is_not_noticed(one_slot: Running, way: type[Client]) -> None:
    """Triton tells a cancellation to the step that begins next, and to none that runs already.

    So the answer is computed to its end, which is the limit of the ensemble (see
    docs/architecture.md), and afterwards nothing is held.
    """
    tokens = 100
    began = time.monotonic()
    leaving = way(one_slot, "ensemble", text_input="a", max_tokens=tokens, ignore_eos=True)
    leaving.token()
    leaving.token()
    left = leaving.leave()

    time.sleep(FREED_S + SHOWN_S)
    assert open_requests(one_slot) == 1
    wait_until(lambda: open_requests(one_slot) == 0, 3 * tokens * STEP_S)
    ended = time.monotonic()
    print(f"left after {left - began:.1f} s, ended after {ended - began:.1f} s")
    assert ended - began > (tokens - 2) * STEP_S
    wait_idle(one_slot, SHOWN_S)


def open_requests(server: Running) -> float:
    return sum(s.value for s in metrics(server) if s.name == "pdserve_open_requests")


def test_a_request_whose_limit_passes_while_it_waits_is_told_so(one_slot: Running) -> None:
    busy = GrpcCancel(one_slot, input_ids=prompt(LONG))
    wait_until(lambda: shown_in_use(one_slot, "pdserve_slots", state="used"), 1)
    began = time.monotonic()
    with pytest.raises(
        Refused, match=r"^UNAVAILABLE: no idle prefill within the TTFT limit of 300 ms"
    ) as late:
        generate(one_slot, "scheduler", input_ids=prompt(5), max_tokens=1, ttft_limit_ms=300)
    waited = time.monotonic() - began
    busy.leave()

    # It leaves the queue as long before its limit as a prefill would take, and the error says so.
    takes = re.search(r"a prefill would take (\d+) ms", str(late.value))
    assert 0.3 - (float(takes[1]) / 1e3 + 1e-3 if takes else 0.0) <= waited < 0.5
    # Triton's generate says 400 whatever the code of a model's error is.
    assert late.value.status == 400


def test_a_request_of_higher_priority_goes_first(one_slot: Running) -> None:
    busy = GrpcCancel(one_slot, input_ids=prompt(LONG))
    low = GrpcCancel(one_slot, input_ids=prompt(5), max_tokens=2)
    wait_until(lambda: open_requests(one_slot) == 2, 1)
    high = GrpcCancel(one_slot, input_ids=prompt(5), max_tokens=2, priority=1)
    wait_until(lambda: open_requests(one_slot) == 3, 1)
    busy.token()
    busy.leave()

    assert high.token() < low.token()
    for client in (high, low):
        client.token()
        client.leave()


# ------------------------------------------------------------ many clients that leave at any moment


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two prefills and two decodes, so few that some requests always wait."""
    folder = tmp_path_factory.mktemp("wide")
    deployment = emulated_deployment(
        folder,
        {"prefill": {"base_ms": 2, "per_token_ms": 0.2}, "decode": {"base_ms": 5}},
        instances=2,
        prefill=Prefill(slots=3, arena_mib=16),
        decode=Decode(slots=12, blocks=256),
    )
    with running(deployment, folder) as server:
        yield server


@pytest.mark.parametrize("requests", [500])
def test_random_cancels_leave_nothing(wide: Running, requests: int) -> None:
    asyncio.run(crowd(wide, 64, random.Random(0)))
    wait_linked(wide)
    wait_idle(wide, 2)
    before = files(wide)

    ends = asyncio.run(crowd(wide, requests, random.Random(1)))

    wait_idle(wide, FREED_S + SHOWN_S)
    wait_same_files(wide, before, 2)
    counted = {end: ends.count(end) for end in sorted(set(ends))}
    print(counted)
    assert counted.keys() == {"complete", "grpc cancel", "grpc timeout", "http close"}
    assert min(counted.values()) > 50
    answer = generate(wide, "scheduler", input_ids=[1, 2, 3], max_tokens=4)
    assert len(answer.ids) == 4


async def crowd(server: Running, requests: int, rng: random.Random) -> list[str]:
    """Return how each of the requests ended; 64 run at a time."""
    places = asyncio.Semaphore(64)
    async with connected(server) as client:

        async def one(seed: float) -> str:
            async with places:
                return await visit(server, client, random.Random(seed))

        return await asyncio.gather(*(one(rng.random()) for _ in range(requests)))


async def visit(server: Running, client: aio.InferenceServerClient, rng: random.Random) -> str:
    """Send one request; its client leaves at a random moment, unless it is complete by then."""
    asked = {
        "input_ids": [rng.randrange(49152) for _ in range(rng.randint(1, 200))],
        "max_tokens": rng.randint(1, 100),
        "stream": rng.random() < 0.7,
    }
    patience = rng.uniform(0.0, 0.7)
    way = rng.choice(["complete", "grpc cancel", "grpc timeout", "http close"])
    if way == "http close":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over_http(server, asked), patience)
        return way
    timeout = max(patience, 0.01) if way == "grpc timeout" else 60.0
    answer = collect(stream(client, "scheduler", timeout=timeout, **asked))
    if way == "grpc timeout":
        # grpcio says "cancelled" when the timeout ends while it closes its side of the stream.
        with contextlib.suppress(AioRpcError, asyncio.CancelledError):
            await answer
    elif way == "grpc cancel":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(answer, patience)
    else:
        parts = await answer
        assert sum(len(part.ids) for part in parts) == asked["max_tokens"]
        assert parts[-1].finish_reason == "length"
    return way


async def collect(parts: AsyncIterator[Part]) -> list[Part]:
    async with contextlib.aclosing(parts) as open_parts:  # type: ignore[type-var]
        return [part async for part in open_parts]


async def over_http(server: Running, asked: dict[str, Any]) -> None:
    """Read the answer as it comes; the socket is closed when this is cancelled."""
    host, _, port = server.http.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        body = json.dumps(asked)
        head = "POST /v2/models/scheduler/generate_stream HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        while b'"finish_reason":"length"' not in await reader.readline():
            pass
    finally:
        writer.close()
