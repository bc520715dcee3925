"""A small client that measures times: streams over gRPC, each of requests one after another.

perf_analyzer is the client of ``perf.load``; this one measures what perf_analyzer cannot: streams
that all run from the beginning of a measurement to its end, and the CPU time of the server between
the two. It runs in a separate process, but on the same cores as the server: its own CPU time limits
a measurement, and is reported with every result.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import struct
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import grpc
import grpc.aio
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.connections import GRPC_OPTIONS
from perf import processes
from perf.answers import Answer
from perf.prompts import prompts

STREAMS_PER_CONNECTION = 16


@dataclass(frozen=True)
class Load:
    """A load that is put on a server."""

    address: str
    """Host and gRPC port."""
    model: str
    streams: int
    requests: int
    """Number of requests in each stream."""
    prompt_tokens: int
    output_tokens: int
    stream: bool
    seed: int = 0
    watch: dict[str, int] = field(default_factory=dict)
    """Names and ids of processes whose CPU time is measured."""


@dataclass
class Measured:
    """All answers to a load, and the CPU seconds that it took."""

    answers: list[Answer]
    client_cpu_s: float
    server_cpu_s: dict[str, float]


def run(load: Load) -> Measured:
    """Run a load in another process.

    Raises:
        RuntimeError: the server answered a request with an error.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, load).result()


def message(
    model: str, name: str, text: str, output_tokens: int, stream: bool
) -> service_pb2.ModelInferRequest:
    """Return a request to pdserve or a model with its tensors."""
    data = text.encode()
    inputs = (
        ("text_input", "BYTES", struct.pack("<I", len(data)) + data),
        ("max_tokens", "INT32", struct.pack("<i", output_tokens)),
        ("stream", "BOOL", bytes([stream])),
        ("ignore_eos", "BOOL", b"\1"),
    )
    tensor = service_pb2.ModelInferRequest.InferInputTensor
    return service_pb2.ModelInferRequest(
        model_name=model,
        id=name,
        inputs=[tensor(name=name, datatype=kind, shape=[1, 1]) for name, kind, _ in inputs],
        raw_input_contents=[raw for _, _, raw in inputs],
    )


def output_tokens(response: service_pb2.ModelInferResponse) -> int | None:
    """Return the output tokens in the stats of an answer's last response.

    None: it is not the last.
    """
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "stats":
            return int(msgspec.json.decode(raw[4:])["output_tokens"])
    return None


def _run(load: Load) -> Measured:
    return asyncio.run(_run_all(load))


async def _run_all(load: Load) -> Measured:
    texts = iter(prompts(load.streams * load.requests, load.prompt_tokens, load.seed))
    work = [
        [
            message(load.model, f"{stream}-{n}", next(texts), load.output_tokens, load.stream)
            for n in range(load.requests)
        ]
        for stream in range(load.streams)
    ]
    connections = [
        grpc.aio.insecure_channel(load.address, options=GRPC_OPTIONS)
        for _ in range(-(-load.streams // STREAMS_PER_CONNECTION))
    ]
    before, cpu = processes.cpu_s(load.watch), time.process_time()
    answers = await asyncio.gather(
        *(one_stream(connections[i % len(connections)], some) for i, some in enumerate(work))
    )
    cpu, after = time.process_time() - cpu, processes.cpu_s(load.watch)
    for connection in connections:
        await connection.close()
    return Measured(
        answers=[answer for some in answers for answer in some],
        client_cpu_s=cpu,
        server_cpu_s={name: after[name] - before[name] for name in before},
    )


async def one_stream(
    connection: grpc.aio.Channel, requests: Sequence[service_pb2.ModelInferRequest]
) -> list[Answer]:
    """Send each request when the previous one has been answered."""
    outgoing: asyncio.Queue[service_pb2.ModelInferRequest] = asyncio.Queue()

    async def sent() -> AsyncIterator[service_pb2.ModelInferRequest]:
        while True:
            yield await outgoing.get()

    call = service_pb2_grpc.GRPCInferenceServiceStub(connection).ModelStreamInfer(sent())
    answers = []
    for request in requests:
        answer = Answer(time.perf_counter())
        outgoing.put_nowait(request)
        async for reply in call:
            answer.responses.append(time.perf_counter())
            if reply.error_message:
                raise RuntimeError(f"{request.model_name}: {reply.error_message}")
            tokens = output_tokens(reply.infer_response)
            if tokens is not None:
                answer.tokens = tokens
                break
        answers.append(answer)
    call.cancel()
    return answers
