"""Tests for the public contract: inputs, outputs, defaults, ids, metrics, restricted calls."""

from __future__ import annotations

import asyncio
import json
import queue
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http

from pdctl import footprint
from pdserve.config import Gateway
from pdserve.triton.neutral import NEUTRAL
from tests.clients import (
    Answer,
    Part,
    Refused,
    ask,
    connected,
    generate,
    generate_stream,
    grpc_part,
    metrics,
    post,
    stream,
    tensor,
    wait_counted,
    wait_until,
)
from tests.servers import emulated_deployment, running

if TYPE_CHECKING:
    from tests.reference import Reference
    from tests.servers import Running

pytestmark = pytest.mark.triton

PROMPT = "The sky is"
TOKENS = 12
STATS = {
    "prompt_tokens": int,
    "cached_tokens": int,
    "output_tokens": int,
    "attempts": int,
    "scenario": str,
    "group": str,
    "prefill": str,
    "decode": str,
    "ms": dict.fromkeys(("forward", "prefill", "transfer", "exposed", "ttft", "e2e"), float),
    "kv": {"bytes": int, "transport": str, "strategy": str, "expected_ms": float},
}


def over_grpc(server: Running, model: str = "pdserve", **asked: Any) -> Answer:
    """Return one answer, by tritonclient's asyncio client."""

    async def run() -> Answer:
        async with connected(server) as client:
            return await ask(client, model, **asked)

    return asyncio.run(run())


def over_callbacks(
    server: Running, model: str = "pdserve", request_id: str = "", **inputs: Any
) -> Answer:
    """Return one answer, by tritonclient's client with threads and callbacks."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    tensors = [tensor(name, value) for name, value in inputs.items()]
    parts, final = [], False
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(
            model, tensors, request_id=request_id, enable_empty_final_response=True
        )
        while not final:
            result, error = arrived.get(timeout=60)
            if error is not None:
                raise Refused(error.message())
            response = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            if response.outputs:
                parts.append(grpc_part(result))
    return Answer(parts)


def over_http(server: Running, request_id: str = "", **fields: Any) -> Answer:
    return generate(server, id=request_id, **fields)


def over_http_stream(server: Running, request_id: str = "", **fields: Any) -> Answer:
    return Answer(list(generate_stream(server, id=request_id, **fields)))


ROUTES = [
    pytest.param(over_http_stream, id="generate_stream"),
    pytest.param(over_grpc, id="grpc-aio"),
    pytest.param(over_callbacks, id="grpc-callbacks"),
]


@pytest.fixture(params=["pdserve", "ensemble"])
def model(request: pytest.FixtureRequest) -> str:
    """The contract is one for both."""
    name: str = request.param
    return name


def same_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return value.keys() == shape.keys() and all(
            same_shape(value[key], shape[key]) for key in shape
        )
    return type(value) is shape


# ---------------------------------------------------------------------------------------- responses


def test_generate_is_exactly_one_response_with_everything(
    emulated_server: Running, model: str
) -> None:
    answer = generate(emulated_server, model, text_input=PROMPT, max_tokens=TOKENS)

    assert answer.text
    assert answer.finish_reason == "length"
    assert same_shape(answer.stats, STATS), answer.stats
    assert answer.stats["output_tokens"] == TOKENS
    assert answer.stats["prompt_tokens"] == 3
    assert answer.stats["prefill"].startswith("prefill_")
    assert answer.stats["decode"].startswith("decode_")
    assert answer.stats["kv"]["bytes"] > 0
    ms = answer.stats["ms"]
    assert 0 <= ms["forward"] <= ms["ttft"] <= ms["e2e"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_ends_with_reason_and_stats(
    emulated_server: Running, model: str, route: Any
) -> None:
    answer = route(emulated_server, model=model, text_input=PROMPT, max_tokens=TOKENS, stream=True)

    *others, last = answer.parts
    assert others
    assert all(not part.finish_reason and part.stats is None for part in others)
    assert last.finish_reason == "length"
    assert same_shape(last.stats, STATS), last.stats
    assert answer.text == generate(emulated_server, text_input=PROMPT, max_tokens=TOKENS).text


@pytest.mark.parametrize("route", [pytest.param(over_http, id="generate"), *ROUTES])
def test_without_stream_there_is_one_response(
    emulated_server: Running, model: str, route: Any
) -> None:
    answer = route(emulated_server, model=model, text_input=PROMPT, max_tokens=TOKENS)

    assert len(answer.parts) == 1


@pytest.mark.parametrize("route", [pytest.param(over_http, id="generate"), *ROUTES])
def test_the_request_id_comes_back_with_every_response(
    emulated_server: Running, model: str, route: Any
) -> None:
    asked = {
        "model": model,
        "text_input": PROMPT,
        "max_tokens": 4,
        "stream": route is not over_http,
    }
    answer = route(emulated_server, request_id="question-7", **asked)

    assert {part.id for part in answer.parts} == {"question-7"}


def test_the_scheduler_answers_with_the_ids_of_the_same_text(
    emulated_server: Running, reference: Reference
) -> None:
    ids = reference.encode(PROMPT)
    alone = generate(emulated_server, "scheduler", input_ids=ids, max_tokens=TOKENS)
    streamed = over_grpc(
        emulated_server, "scheduler", input_ids=ids, max_tokens=TOKENS, stream=True
    )

    assert len(alone.ids) == TOKENS
    assert alone.ids == streamed.ids
    assert len(streamed.parts) > 1
    assert same_shape(alone.stats, STATS)
    text = generate(emulated_server, text_input=PROMPT, max_tokens=TOKENS).text
    assert text == reference.decode(alone.ids)


# ------------------------------------------------------------------------------------------- inputs

INPUTS: dict[str, Any] = {
    "chat": False,
    "max_tokens": TOKENS,
    "stream": False,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 2**64 - 1,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "stop_words": ["\u0000never"],
    "ignore_eos": True,
    "exclude_input_in_output": True,
    "scenario": "default",
    "tenant": "somebody",
    "priority": -3,
    "ttft_limit_ms": 30_000,
}


@pytest.mark.parametrize("name", [*INPUTS, "all"])
def test_every_input_is_accepted(emulated_server: Running, model: str, name: str) -> None:
    inputs = INPUTS if name == "all" else {"max_tokens": TOKENS, name: INPUTS[name]}

    for answer in (
        generate(emulated_server, model, text_input=PROMPT, **inputs),
        over_grpc(emulated_server, model, text_input=PROMPT, **inputs),
    ):
        assert answer.stats["output_tokens"] == TOKENS


def test_every_input_of_the_contract_is_in_the_model_s_configuration(
    emulated_server: Running, model: str
) -> None:
    with urllib.request.urlopen(f"{emulated_server.http}/v2/models/{model}") as answer:
        described = json.load(answer)

    of_tensorrt_llm = {*NEUTRAL, "random_seed", "end_id", "pad_id", "accumulate_tokens"}
    known = {"text_input", *INPUTS, *of_tensorrt_llm}
    assert {entry["name"] for entry in described["inputs"]} == known
    assert [entry["name"] for entry in described["outputs"]] == [
        "text_output",
        "finish_reason",
        "stats",
    ]
    assert all(entry["shape"] in ([-1, 1], [-1, -1]) for entry in described["inputs"])


@pytest.mark.parametrize(
    "routing",
    [
        pytest.param({"tenant": "t", "scenario": "default"}, id="fields"),
        pytest.param({"parameters": {"tenant": "t", "scenario": "default"}}, id="parameters"),
    ],
)
def test_routing_is_accepted_as_fields_and_as_parameters(
    emulated_server: Running, model: str, routing: dict[str, Any]
) -> None:
    for route in (over_http, over_grpc):
        answer = route(emulated_server, model=model, text_input=PROMPT, max_tokens=2, **routing)
        assert answer.finish_reason == "length"


def test_a_tenant_s_prompt_is_reused_for_that_tenant_alone(
    emulated_server: Running, model: str
) -> None:
    prompt = f"one two three four {model} " * 20

    def cached(**routing: Any) -> int:
        answer = over_grpc(emulated_server, model, text_input=prompt, max_tokens=2, **routing)
        count: int = answer.stats["cached_tokens"]
        return count

    assert cached(tenant="first") == 0
    assert cached(tenant="first") > 0
    assert cached(parameters={"tenant": "first"}) > 0
    assert cached(tenant="second") == 0


def test_defaults(emulated_server: Running, model: str) -> None:
    answer = generate(emulated_server, model, text_input=PROMPT)

    assert answer.stats["output_tokens"] == 128
    assert not answer.text.startswith(PROMPT)


def test_max_tokens_defaults_to_what_the_context_leaves(emulated_server: Running) -> None:
    answer = generate(emulated_server, "scheduler", input_ids=[5] * 8190)

    assert answer.stats["output_tokens"] == 2


@pytest.mark.parametrize("words", ["", [""], []], ids=["empty", "one-empty", "none"])
def test_empty_stop_words_stop_nothing(emulated_server: Running, model: str, words: Any) -> None:
    for fields in ({"stop_words": words}, {"stop_words": words, "bad_words": ""}):
        answer = generate(emulated_server, model, text_input=PROMPT, max_tokens=TOKENS, **fields)
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(
    emulated_server: Running, model: str, streamed: bool
) -> None:
    text = generate(emulated_server, text_input=PROMPT, max_tokens=40).text
    # The stop string spans two tokens; nearly all tokens of the emulated engine are words.
    space = text.index(" ", len(text) // 2)
    word = text[space - 2 : space + 3]
    answer = over_grpc(
        emulated_server,
        model,
        text_input=PROMPT,
        max_tokens=40,
        stop_words=["\u0000never", word],
        stream=streamed,
    )

    assert answer.text == text[: text.index(word)]
    assert answer.finish_reason == "stop"
    assert answer.stats["output_tokens"] < 40
    assert (len(answer.parts) > 1) is streamed


@pytest.mark.parametrize("route", [over_http, over_grpc], ids=["http", "grpc"])
def test_the_prompt_is_echoed_only_when_asked_for(
    emulated_server: Running, model: str, route: Any
) -> None:
    def text(**asked: Any) -> str:
        answer: Answer = route(
            emulated_server, model=model, text_input=PROMPT, max_tokens=4, **asked
        )
        return answer.text

    assert text(exclude_input_in_output=False) == PROMPT + text()
    assert text(exclude_input_in_output=True) == text()


def test_the_end_of_text_token_ends_an_answer_unless_it_is_ignored(
    torch_server: Running, model: str
) -> None:
    asked = {
        "model": model,
        "text_input": "Answer with one word: is water wet?",
        "chat": True,
        "max_tokens": 60,
    }
    answer = generate(torch_server, **asked)
    longer = generate(torch_server, **asked, ignore_eos=True)

    assert answer.finish_reason == "stop"
    assert answer.stats["output_tokens"] < 60
    assert longer.finish_reason == "length"
    assert longer.stats["output_tokens"] == 60
    assert longer.text.startswith(answer.text)


# -------------------------------------------------------------------------------------- text models

CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Naïve café? 你好 🙂"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?\n\n"},
]
CHATS = [
    pytest.param("Why is the sky blue?", None, id="plain-text"),
    pytest.param("[1] is a footnote, not JSON", None, id="bracket"),
    pytest.param(json.dumps(CONVERSATION), CONVERSATION, id="conversation"),
    pytest.param(json.dumps(CONVERSATION[:2], indent=2), CONVERSATION[:2], id="indented"),
]


@pytest.mark.parametrize(("text", "conversation"), CHATS)
def test_chat_is_rendered_as_transformers_does(
    emulated_server: Running, reference: Reference, model: str, text: str, conversation: Any
) -> None:
    turns = conversation or [{"role": "user", "content": text}]
    expected = reference.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    status, answer = post(
        emulated_server, "/v2/models/tokenizer/generate", {"text_input": text, "chat": True}
    )
    chatted = generate(emulated_server, model, text_input=text, chat=True, max_tokens=TOKENS)
    by_ids = generate(emulated_server, "scheduler", input_ids=expected, max_tokens=TOKENS)

    assert (status, answer.get("input_ids")) == (200, expected)
    assert chatted.stats["prompt_tokens"] == len(expected)
    assert chatted.text == reference.decode(by_ids.ids)


@pytest.mark.parametrize("protocol", [http, grpc], ids=["http", "grpc"])
def test_tokenizer_and_detokenizer_are_inverse(emulated_server: Running, protocol: Any) -> None:
    text = "Naïve café, 你好 🙂\n\tdef f(x): return x"
    url = emulated_server.http.removeprefix("http://")
    if protocol is grpc:
        url = emulated_server.grpc

    with protocol.InferenceServerClient(url) as client:

        def call(model: str, name: str, dtype: str, values: Any, output: str) -> Any:
            given = protocol.InferInput(name, list(values.shape), dtype)
            given.set_data_from_numpy(values)
            return client.infer(model, [given]).as_numpy(output)

        prompt = np.array([[text.encode()]], object)
        ids = call("tokenizer", "text_input", "BYTES", prompt, "input_ids")
        back = call("detokenizer", "output_ids", "INT32", ids, "text_output")

    assert ids.shape[0] == 1
    assert back.tolist() == [[text.encode()]]


# -------------------------------------------------------------------------------------- first token


@pytest.fixture(scope="module")
def slow_decode(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("slow-decode")
    profile = {"prefill": {"base_ms": 30}, "decode": {"base_ms": 1200}}
    with running(emulated_deployment(folder, profile), folder) as server:
        yield server


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_first_token_comes_before_decode_begins(slow_decode: Running, protocol: str) -> None:
    asked: dict[str, Any] = {"input_ids": [7, 8, 9], "max_tokens": 3, "stream": True}

    async def by_grpc() -> list[Part]:
        async with connected(slow_decode) as client:
            return [part async for part in stream(client, "scheduler", **asked)]

    if protocol == "grpc":
        parts = asyncio.run(by_grpc())
    else:
        parts = list(generate_stream(slow_decode, "scheduler", **asked))

    assert [len(part.ids) for part in parts] == [1, 1, 1]
    assert parts[1].at - parts[0].at > 0.5
    assert parts[-1].stats is not None
    assert parts[-1].stats["ms"]["ttft"] < 400


@pytest.mark.full
def test_the_other_channel_answers_the_same(
    emulated_server: Running, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cancelled in dozens at once, decoupled BLS can deadlock inside Triton's stub (24.10)."""

    async def run(server: Running) -> list[list[int]]:
        async with connected(server) as client:
            asked = (
                ask(client, "scheduler", input_ids=[3, number], max_tokens=20, stream=True)
                for number in range(40)
            )
            return [answer.ids for answer in await asyncio.gather(*asked)]

    folder = tmp_path_factory.mktemp("bls")
    deployment = emulated_deployment(folder, {"speed": 0}, gateway=Gateway(channel="bls"))
    with running(deployment, folder) as server:
        assert asyncio.run(run(server)) == asyncio.run(run(emulated_server))


# ------------------------------------------------------------------------------------------ metrics


def test_the_metrics_of_the_contract_are_there(emulated_server: Running) -> None:
    def counted(outcome: str) -> float:
        return sum(
            sample.value
            for sample in metrics(emulated_server)
            if sample.name == "pdserve_requests_total"
            and sample.labels == {"scenario": "default", "outcome": outcome}
        )

    wait_counted()
    before = counted("length")
    generate(emulated_server, text_input=PROMPT, max_tokens=TOKENS)
    wait_until(lambda: counted("length") == before + 1, 1.0)
    pulls = "pdserve_kv_transfer_seconds_count"  # the decode publishes in its own time
    wait_until(lambda: any(sample.name == pulls for sample in metrics(emulated_server)), 1.0)

    found: dict[str, set[tuple[str, ...]]] = {}
    for sample in metrics(emulated_server):
        found.setdefault(sample.name, set()).add(tuple(sorted(sample.labels)))
    for name in ("pdserve_ttft_seconds", "pdserve_tpot_seconds", "pdserve_e2e_seconds"):
        assert found[f"{name}_bucket"] == {("group", "le", "scenario")}
        assert found[f"{name}_sum"] == found[f"{name}_count"] == {("group", "scenario")}
    assert found["pdserve_kv_transfer_seconds_bucket"] == {("le",)}
    assert found["pdserve_kv_transfer_bytes_total"] == {("transport",)}
    assert "pdserve_forward_attempts_total" in found
    assert found["pdserve_slots"] == {("instance", "state")}
    assert all("state" in labels for labels in found["pdserve_kv_leases"])
    assert all("state" in labels for labels in found["pdserve_kv_blocks"])
    slots = {
        sample.labels["instance"]
        for sample in metrics(emulated_server)
        if sample.name == "pdserve_slots"
    }
    assert slots == {"prefill_0", "prefill_1", "decode_0", "decode_1"}


def test_histograms_are_cumulative_and_end_with_their_count(emulated_server: Running) -> None:
    generate(emulated_server, text_input=PROMPT, max_tokens=TOKENS)
    buckets = {
        float(sample.labels["le"]): sample.value
        for sample in metrics(emulated_server)
        if sample.name == "pdserve_e2e_seconds_bucket"
    }
    count = next(
        sample.value
        for sample in metrics(emulated_server)
        if sample.name == "pdserve_e2e_seconds_count"
    )

    values = [buckets[bound] for bound in sorted(buckets)]
    assert values == sorted(values)
    assert buckets[float("inf")] == pytest.approx(count, abs=1)


# --------------------------------------------------------------------------------- restricted calls

CONTROLS = [
    "/v2/repository/index",
    "/v2/repository/models/decode_0/unload",
    "/v2/repository/models/decode_0/load",
    "/v2/logging",
    "/v2/trace/setting",
]


@pytest.mark.parametrize("path", CONTROLS)
def test_control_is_refused_over_http_without_the_key(emulated_server: Running, path: str) -> None:
    status, answer = post(emulated_server, path, {})

    assert status == 403, answer


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("get_model_repository_index", ()),
        ("unload_model", ("decode_0",)),
        ("load_model", ("decode_0",)),
        ("update_log_settings", ({"log_verbose_level": 1},)),
        ("update_trace_settings", ()),
    ],
)
def test_control_is_refused_over_grpc_without_the_key(
    emulated_server: Running, call: str, arguments: tuple[Any, ...]
) -> None:
    with (
        grpc.InferenceServerClient(emulated_server.grpc) as client,
        pytest.raises(Exception, match="protocol is restricted"),
    ):
        getattr(client, call)(*arguments)


def test_everything_listens_on_loopback_alone(emulated_server: Running) -> None:
    token = emulated_server.servers[0].token
    assert token is not None
    pids = {process.pid for process in footprint.processes([token])}
    listening = {
        connection.laddr[0].removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    }

    assert listening == {"127.0.0.1"}
