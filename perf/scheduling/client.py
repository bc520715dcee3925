"""Chains of requests, over gRPC streams, to one gateway or several."""

from __future__ import annotations

import asyncio
import itertools
import math
import struct
import zlib
from collections.abc import AsyncIterator, Sequence

import grpc.aio
import msgspec
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.connections import GRPC_OPTIONS
from perf.scheduling.samples import Sample
from perf.scheduling.workload import Ask, Chain

LEAD_S = 0.5
"""Seconds until the beginning of a run, for its preparation."""
ANSWER_S = 60.0
"""Seconds after its limit at which an answer that is not complete counts as lost."""
FIRST_TOKEN, LAST_TOKEN = 100, 40_000
"""Range of token ids in the default model's vocabulary that has no special tokens."""


def run(
    chains: Sequence[Chain],
    addresses: Sequence[str],
    until: float = math.inf,
    way_s: float = 0.0,
) -> list[Sample]:
    """Send all requests, in the order of arrival. The chains are spread over the gateways in turn.

    Args:
        addresses: host and gRPC port of each gateway.
        until: no request is sent from then on (seconds from the beginning).
        way_s: seconds to a gateway and back. The limit in a request is reduced by this, since a
            server counts from the request's arrival.
    """
    return asyncio.run(_run(chains, addresses, until, way_s))


async def _run(
    chains: Sequence[Chain], addresses: Sequence[str], until: float, way_s: float
) -> list[Sample]:
    began = asyncio.get_running_loop().time() + LEAD_S
    gateways = [_Gateway(number, address, began, way_s) for number, address in enumerate(addresses)]
    turns = itertools.cycle(gateways)
    followed = await asyncio.gather(*(_follow(chain, next(turns), until) for chain in chains))
    for gateway in gateways:
        await gateway.close()
    return sorted((sample for some in followed for sample in some), key=lambda one: one.due)


async def _follow(chain: Chain, gateway: _Gateway, until: float) -> list[Sample]:
    samples: list[Sample] = []
    now = 0.0
    for ask in chain:
        due = max(now, ask.due)
        if due >= until:
            break
        sample = Sample(ask, due, gateway=gateway.number)
        await gateway.answer(sample)
        samples.append(sample)
        now = sample.ended
    return samples


class _Gateway:
    """Streams to one gateway, each for one request at a time.

    Args:
        began: beginning of the run (`loop.time()` seconds).
        way_s: see `run`.
    """

    def __init__(self, number: int, address: str, began: float, way_s: float) -> None:
        self.number = number
        self._began = began
        self._way_s = way_s
        self._channel = grpc.aio.insecure_channel(address, options=GRPC_OPTIONS)
        self._idle: list[_Stream] = []

    async def answer(self, sample: Sample) -> None:
        """Send the request when it is due, and record its answer."""
        loop = asyncio.get_running_loop()
        request = message(sample.ask, self._way_s)
        await asyncio.sleep(self._began + sample.due - loop.time())
        stream = self._idle.pop() if self._idle else _Stream(self._channel)
        try:
            reading = stream.answer(request, sample, self._began)
            await asyncio.wait_for(reading, sample.ask.limit_s + ANSWER_S)
        except (grpc.aio.AioRpcError, EOFError, asyncio.TimeoutError) as error:
            sample.error = repr(error)
            stream.call.cancel()
        else:
            self._idle.append(stream)
        sample.ended = loop.time() - self._began

    async def close(self) -> None:
        for stream in self._idle:
            stream.call.cancel()
        await self._channel.close()


class _Stream:
    """An open gRPC stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._outgoing: asyncio.Queue[service_pb2.ModelInferRequest] = asyncio.Queue()
        self.call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
            self._requests()
        )

    async def _requests(self) -> AsyncIterator[service_pb2.ModelInferRequest]:
        while True:
            yield await self._outgoing.get()

    async def answer(
        self, request: service_pb2.ModelInferRequest, sample: Sample, began: float
    ) -> None:
        """Read up to the last response."""
        loop = asyncio.get_running_loop()
        self._outgoing.put_nowait(request)
        async for reply in self.call:
            if reply.error_message:
                sample.error = reply.error_message
                return
            if sample.first is None:
                sample.first = loop.time() - began
            response = reply.infer_response
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
                if output.name == "stats":
                    stats = msgspec.json.decode(raw[4:])
                    sample.prefill = stats["prefill"]
                    sample.prefill_s = stats["ms"]["prefill"] / 1e3
                    sample.way_s = (sample.ttft or 0.0) - stats["ms"]["ttft"] / 1e3
                    return
        raise EOFError("the stream ended before the answer")


def message(ask: Ask, way_s: float = 0.0) -> service_pb2.ModelInferRequest:
    """Return a request to the model that takes token ids, so that the prompt's length is exact."""
    ids = prompt(ask)
    scenario = ask.scenario.encode()
    inputs = (
        ("input_ids", "INT32", len(ids) // 4, ids),
        ("max_tokens", "INT32", 1, struct.pack("<i", ask.outputs)),
        ("stream", "BOOL", 1, b"\1"),
        ("ignore_eos", "BOOL", 1, b"\1"),
        ("ttft_limit_ms", "INT32", 1, struct.pack("<i", round((ask.limit_s - way_s) * 1e3))),
        ("scenario", "BYTES", 1, struct.pack("<I", len(scenario)) + scenario),
    )
    tensor = service_pb2.ModelInferRequest.InferInputTensor
    return service_pb2.ModelInferRequest(
        model_name="scheduler",
        inputs=[
            tensor(name=name, datatype=kind, shape=[1, count]) for name, kind, count, _ in inputs
        ],
        raw_input_contents=[raw for *_, raw in inputs],
    )


def prompt(ask: Ask) -> bytes:
    """Return token ids: those of its prefix, then some that no other prompt has."""
    shared = b""
    if ask.prefix is not None:
        shared = _ids(zlib.crc32(f"{ask.scenario} {ask.prefix}".encode()), ask.shared)
    return shared + _ids(ask.seed, ask.tokens - ask.shared)


def _ids(seed: int, count: int) -> bytes:
    drawn = np.random.default_rng(seed).integers(FIRST_TOKEN, LAST_TOKEN, count, "<i4")
    return drawn.tobytes()
