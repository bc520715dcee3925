"""Tests that random requests over HTTP and gRPC end once, with an answer or a named error."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc.aio
import numpy as np
import pytest
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pdserve.triton.neutral import NEUTRAL
from tests.fuzz.aftermath import unharmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

    from tests.fuzz.budget import Budget
    from tests.servers import Running

pytestmark = pytest.mark.triton

ENDS_S = 60.0
"""Seconds within which a request ends, on a busy machine."""
CODES = ("INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "NOT_FOUND", "CANCELLED")
AT_ONCE = 32
"""Requests of one example that are sent side by side."""

text = st.text(max_size=40)
label = st.sampled_from(["", "a", "default", "x" * 64, "x" * 65, "a\nb", "é" * 33]) | text
whole = st.integers(-2, 64) | st.sampled_from([-(2**31), 2**31 - 1, 8191, 8192, 49151, 49152])
real = st.floats(width=32) | st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 100.0])
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | text, "content": text},
    optional={"name": text},
)
conversation = st.lists(turn | st.none() | st.integers(), max_size=4).map(json.dumps)
prompt = text | conversation | st.sampled_from(["", "a", "[", "[{", "<|im_end|>", "a " * 9000])
# Small answers, so that there can be many.
VALUES: dict[str, tuple[str, SearchStrategy[Any]]] = {
    "text_input": ("BYTES", prompt),
    "input_ids": ("INT32", st.lists(whole, max_size=9)),
    "chat": ("BOOL", st.booleans()),
    "stream": ("BOOL", st.booleans()),
    "ignore_eos": ("BOOL", st.booleans()),
    "exclude_input_in_output": ("BOOL", st.booleans()),
    "max_tokens": ("INT32", st.integers(-1, 20)),
    "temperature": ("FP32", real),
    "top_k": ("INT32", whole),
    "top_p": ("FP32", real),
    "seed": ("UINT64", st.integers(0, 2**64 - 1) | st.integers(0, 2)),
    "random_seed": ("UINT64", st.integers(0, 2)),
    "repetition_penalty": ("FP32", real),
    "presence_penalty": ("FP32", real),
    "frequency_penalty": ("FP32", real),
    "stop_words": ("BYTES", st.lists(st.sampled_from(["", "<|im_end|>", "e", "x" * 257]) | text)),
    "scenario": ("BYTES", label),
    "tenant": ("BYTES", label),
    "priority": ("INT32", whole),
    "ttft_limit_ms": ("INT32", st.sampled_from([-1, 0, 1, 50, 10_000])),
    "end_id": ("INT32", whole | st.just(2)),
    "pad_id": ("INT32", whole),
    "accumulate_tokens": ("BOOL", st.booleans()),
}
KINDS = {bool: "BOOL", bytes: "BYTES", float: "FP32", int: "INT32"}
for name, (neutral,) in NEUTRAL.items():
    kind = "UINT64" if name in ("lora_task_id", "prompt_table_extra_id") else KINDS[type(neutral)]
    given = neutral.decode() if isinstance(neutral, bytes) else neutral
    other = {"BOOL": st.booleans(), "BYTES": text, "FP32": real}.get(kind, st.integers(0, 3))
    VALUES[name] = kind, st.just(given) | other
wrong = st.none() | st.booleans() | whole | real | text | st.lists(whole, max_size=3)
parameters = st.dictionaries(
    st.sampled_from(["tenant", "scenario", "timeout", "traceparent", "failure_notice", "other"])
    | text,
    text | st.integers(-(2**63), 2**63 - 1) | st.booleans(),
    max_size=2,
)


class ClientRequest(NamedTuple):
    """One request to be sent."""

    model: str
    fields: dict[str, Any]
    parameters: dict[str, Any]
    spoiled: str
    place: int
    streamed: bool


@st.composite
def client_requests(draw: st.DrawFn) -> ClientRequest:
    model = draw(st.sampled_from(["pdserve"] * 3 + ["ensemble", "scheduler", "tokenizer"]))
    needed = "input_ids" if model == "scheduler" else "text_input"
    names = draw(st.lists(st.sampled_from([*VALUES]), max_size=4, unique=True))
    names = [] if model == "tokenizer" else names
    fields = {one: draw(VALUES[one][1]) for one in (needed, "max_tokens", *names)}
    if model == "tokenizer":
        del fields["max_tokens"]
    spoils = ["", "", "", "", "utf8", "type", "shape", "name", "without"]
    return ClientRequest(
        model,
        fields,
        draw(st.just({}) | parameters),
        draw(st.sampled_from(spoils)),
        draw(st.integers(0, 99)),
        draw(st.booleans()),
    )


def spoiled_name(one: ClientRequest) -> str:
    names = [*one.fields]
    return names[one.place % len(names)]


# --------------------------------------------------------------------------------------------- HTTP


def body(one: ClientRequest) -> bytes:
    fields = {**one.fields}
    name = spoiled_name(one)
    if one.spoiled == "type":
        fields[name] = ["x", 1.5, {"a": 1}, None, [[1], [2]], -(2**70)][one.place % 6]
    elif one.spoiled == "name":
        fields[f"{name}_"] = fields.pop(name)
    elif one.spoiled == "without":
        del fields[name]
    elif one.spoiled == "shape":
        fields[name] = [fields[name]] * 2
    made = {**one.parameters, **fields} if one.place % 2 else fields
    data = json.dumps(made).encode()
    if one.spoiled == "utf8":
        at = data.find(b'": "')
        data = data[: at + 4] + b"\xff" + data[at + 4 :] if at > 0 else data
    return data


async def over_http(server: Running, one: ClientRequest) -> None:
    path = f"/v2/models/{one.model}/generate{'_stream' if one.streamed else ''}"
    address, _, port = server.http.removeprefix("http://").partition(":")
    data = body(one)
    reader, writer = await asyncio.open_connection(address, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    answer = await asyncio.wait_for(reader.read(), ENDS_S)
    writer.close()
    top, _, content = answer.partition(b"\r\n\r\n")
    said = content.decode(errors="replace")
    assert answer.startswith(b"HTTP/1.1 "), (one, answer[:200])
    status = int(top.split()[1])
    assert "INTERNAL" not in said, (one, said)
    assert "Traceback" not in said, (one, said)
    assert status in (200, 400, 404, 500, 501, 503), (one, said)
    if status == 500:  # an error of Triton itself, for JSON of wrong types or for no JSON
        assert not any(f'"{code}:' in said for code in CODES), (one, said)
    elif one.model != "tokenizer":
        ends = sum(said.count(f'"finish_reason":"{reason}"') for reason in ("stop", "length"))
        assert ends + said.count('"error":') == 1, (one, said)


# --------------------------------------------------------------------------------------------- gRPC

PACKED: dict[str, Callable[[Any], bytes]] = {
    "BYTES": lambda value: struct.pack("<I", len(value)) + value,
    "BOOL": lambda value: bytes([bool(value)]),
    "INT32": lambda value: np.array(value, np.int64).astype("<i4").tobytes(),
    "UINT64": lambda value: np.array(value, np.uint64).astype("<u8").tobytes(),
    "FP32": lambda value: np.array(value, "<f4").tobytes(),
}


def message(one: ClientRequest) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name=one.model, id=f"{one.place}")
    spoil = spoiled_name(one)
    for name, value in one.fields.items():
        if name == spoil and one.spoiled == "without":
            continue
        kind = VALUES[name][0]
        values = value if isinstance(value, list) else [value]
        if kind == "BYTES":
            values = [item.encode() for item in values]
        if name == spoil and one.spoiled == "utf8" and kind == "BYTES":
            values = [item + b"\xc3" for item in values]
        shape = [1, len(values)]
        data = b"".join(map(PACKED[kind], values))
        if name == spoil and one.spoiled == "shape":
            shape = [[len(values)], [2, len(values)], [0, 1], [1, 1, 1], [-1, 1]][one.place % 5]
        if name == spoil and one.spoiled == "type":
            kind = ["INT64", "FP64", "BYTES", "BOOL", "NOPE"][one.place % 5]
        shown = f"{name}_" if name == spoil and one.spoiled == "name" else name
        made.inputs.add(name=shown, datatype=kind, shape=shape)
        made.raw_input_contents.append(data)
    for name, value in one.parameters.items():
        field = {bool: "bool_param", int: "int64_param"}.get(type(value), "string_param")
        setattr(made.parameters[name], field, value)
    return made


async def over_grpc(channel: grpc.aio.Channel, one: ClientRequest) -> None:
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(timeout=ENDS_S)
    await call.write(message(one))
    await call.done_writing()
    ends = []
    async for response in call:
        said = response.error_message
        names = [output.name for output in response.infer_response.outputs]
        raw = dict(zip(names, response.infer_response.raw_output_contents, strict=False))
        if said:
            assert not said.startswith("INTERNAL"), (one, said)
            assert "Traceback" not in said, (one, said)
            ends.append(said)
        elif one.model == "tokenizer" or raw.get("finish_reason", b"")[4:]:
            ends.append("answered")
    assert len(ends) == 1, (one, ends)


def test_requests_end_once_with_an_answer_or_an_error_by_name(
    fuzzed_server: Running, budget: Budget
) -> None:
    async def feed(fed: list[ClientRequest]) -> None:
        async with grpc.aio.insecure_channel(fuzzed_server.grpc) as channel:
            waits = [over_http(fuzzed_server, one) for one in fed]
            waits += [over_grpc(channel, one) for one in fed]
            await asyncio.gather(*waits)

    def use(fed: list[ClientRequest]) -> int:
        asyncio.run(feed(fed))
        return 2 * len(fed)

    with unharmed(fuzzed_server):
        made = budget.spend(st.lists(client_requests(), min_size=8, max_size=AT_ONCE), use)
    print(f"\n{made} requests")
    assert "INTERNAL" not in fuzzed_server.servers[0].read_log()
