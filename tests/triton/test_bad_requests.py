"""Tests for requests that cannot be served: the status, a helpful message, and no harm done."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from tests.clients import (
    Answer,
    Refused,
    ask,
    connected,
    files,
    generate,
    generate_stream,
    post,
    raw,
    wait_idle,
    wait_same_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Running

pytestmark = pytest.mark.triton

TIMEOUT_S = 20.0
NAN, INF = float("nan"), float("inf")
GENERATE = "/v2/models/pdserve/generate"
UNPARSABLE = "Unable to parse"


class Bad(NamedTuple):
    """A request that differs from a valid one by ``fields``; ``says`` are parts of the message."""

    name: str
    fields: dict[str, Any]
    says: tuple[str, ...]
    model: str = "pdserve"


def chat(text: str) -> dict[str, Any]:
    return {"text_input": text, "chat": True}


# Values that both JSON and tensors can carry.
VALUES = [
    Bad("empty-prompt", {"text_input": ""}, ("text_input", "empty", "at least 1 byte")),
    Bad("prompt-over-the-context", {"text_input": "a " * 9000}, ("9001 tokens", "at most 8191")),
    Bad("prompt-over-a-MiB", {"text_input": "a" * (2**20 + 1)}, ("1048577 bytes", "1048576")),
    Bad("max_tokens-0", {"max_tokens": 0}, ("max_tokens: 0", "1 to 8191")),
    Bad("max_tokens-negative", {"max_tokens": -1}, ("max_tokens: -1", "1 to 8191")),
    Bad("max_tokens-over-the-context", {"max_tokens": 8192}, ("max_tokens: 8192", "1 to 8191")),
    Bad("max_tokens-huge", {"max_tokens": 2**31 - 1}, ("max_tokens: 2147483647", "1 to 8191")),
    Bad("temperature-negative", {"temperature": -0.1}, ("temperature: -0.1", "0.0 to 100.0")),
    Bad("temperature-nan", {"temperature": NAN}, ("temperature: nan", "0.0 to 100.0")),
    Bad("temperature-inf", {"temperature": INF}, ("temperature: inf", "0.0 to 100.0")),
    Bad("temperature-minus-inf", {"temperature": -INF}, ("temperature: -inf", "0.0 to 100.0")),
    Bad("temperature-huge", {"temperature": 1e30}, ("temperature: 1e+30", "0.0 to 100.0")),
    Bad("top_p-negative", {"top_p": -0.5}, ("top_p: -0.5", "from 0.0 to 1.0")),
    Bad("top_p-over-1", {"top_p": 1.5}, ("top_p: 1.5", "from 0.0 to 1.0")),
    Bad("top_p-nan", {"top_p": NAN}, ("top_p: nan", "from 0.0 to 1.0")),
    Bad("top_k-negative", {"top_k": -1}, ("top_k: -1", "0 to 16777216")),
    Bad("top_k-huge", {"top_k": 2**31 - 1}, ("top_k: 2147483647", "0 to 16777216")),
    Bad("repetition-0", {"repetition_penalty": 0.0}, ("repetition_penalty: 0", "more than 0.0")),
    Bad("repetition-nan", {"repetition_penalty": NAN}, ("repetition_penalty: nan", "10.0")),
    Bad("repetition-huge", {"repetition_penalty": 11.0}, ("repetition_penalty: 11", "10.0")),
    Bad("presence-high", {"presence_penalty": 2.5}, ("presence_penalty: 2.5", "-2.0 to 2.0")),
    Bad("presence-inf", {"presence_penalty": INF}, ("presence_penalty: inf", "-2.0 to 2.0")),
    Bad("frequency-low", {"frequency_penalty": -3.0}, ("frequency_penalty: -3", "-2.0 to 2.0")),
    Bad("frequency-nan", {"frequency_penalty": NAN}, ("frequency_penalty: nan", "-2.0 to 2.0")),
    Bad("stop-words-17", {"stop_words": [f"s{n}" for n in range(17)]}, ("stop_words: 17", "16")),
    Bad("stop-word-long", {"stop_words": ["ok", "x" * 257]}, ("stop_words: 'xxx", "257", "256")),
    Bad("tenant-long", {"tenant": "t" * 65}, ("tenant: 'ttt", "64 bytes")),
    Bad("tenant-control-character", {"tenant": "a\nb"}, (r"tenant: 'a\nb'", "printable")),
    Bad("scenario-long", {"scenario": "é" * 33}, ("scenario: 'é", "64 bytes")),
    Bad("ttft-limit-0", {"ttft_limit_ms": 0}, ("ttft_limit_ms: 0", "1 to 2147483647")),
    Bad("ttft-limit-negative", {"ttft_limit_ms": -5}, ("ttft_limit_ms: -5", "1 to 2147483647")),
    Bad("chat-cut-off", chat('[{"role": "user", "content":'), ("bad JSON chat", "truncated")),
    Bad("chat-bad-json", chat('[{"role": "user", content: "x"}]'), ("bad JSON chat",)),
    Bad("chat-role", chat('[{"role": "tool", "content": "x"}]'), ("'tool'", '"user"', "[0].role")),
    Bad("chat-no-content", chat('[{"role": "user"}]'), ("`content`", "[0]")),
    Bad("chat-number", chat('[{"role": "user", "content": 1}]'), ("`int`", "[0].content")),
    Bad("chat-extra", chat('[{"role": "user", "content": "", "n": 1}]'), ("`n`", '"content"')),
    Bad("chat-no-turns", chat("[]"), ("not a conversation", ">= 1")),
    Bad("chat-answered", chat('[{"role": "assistant", "content": "x"}]'), ("'assistant'", "user")),
    Bad("no-ids", {"input_ids": []}, ("input_ids: empty", "at least 1"), "scheduler"),
    Bad("id-negative", {"input_ids": [3, -1]}, ("input_ids: -1", "0 to 49151"), "scheduler"),
    Bad("id-unknown", {"input_ids": [49152]}, ("input_ids: 49152", "0 to 49151"), "scheduler"),
    Bad("too-many-ids", {"input_ids": [5] * 8192}, ("8192 tokens", "at most 8191"), "scheduler"),
    Bad("chat-with-ids", {"chat": True}, ("chat", "together with text_input"), "scheduler"),
    Bad("text-missing", {"text_input": None, "top_k": 1}, ("text_input is missing",)),
    Bad("ids-missing", {"input_ids": None, "top_k": 1}, ("input_ids is missing",), "scheduler"),
    Bad("unknown-model", {}, ("nope", "not found"), "nope"),
]

# Values that only a tensor can carry.
TENSORS = [
    Bad(
        "invalid-utf8",
        {"text_input": raw("text_input", "BYTES", np.array([[b"ab\xff"]], object))},
        ("not valid UTF-8", "0xff", "offset 2"),
    ),
    Bad(
        "stop-word-invalid-utf8",
        {"stop_words": raw("stop_words", "BYTES", np.array([[b"\xc3"]], object))},
        ("stop_words", "invalid UTF-8", "byte 0"),
    ),
    Bad(
        "tenant-invalid-utf8",
        {"tenant": raw("tenant", "BYTES", np.array([[b"a\x80"]], object))},
        ("tenant", "invalid UTF-8", "byte 1"),
    ),
    Bad(
        "batch-of-two",
        {"text_input": raw("text_input", "BYTES", np.array([[b"a"], [b"b"]], object))},
        ("text_input", "batch of 2", "one prompt"),
    ),
    Bad(
        "batch-of-nine",
        {"text_input": raw("text_input", "BYTES", np.array([[b"a"]] * 9, object))},
        ("batch-size must be <= 8",),
    ),
    Bad(
        "batch-of-none",
        {"text_input": raw("text_input", "BYTES", np.empty((0, 1), object))},
        ("text_input", "expected 1", "got 0"),
    ),
    Bad(
        "batch-sizes-differ",
        {"temperature": raw("temperature", "FP32", np.ones((2, 1), np.float32))},
        ("text_input", "batch size does not match"),
    ),
    Bad(
        "no-batch-dimension",
        {"text_input": raw("text_input", "BYTES", np.array([b"a"], object))},
        ("text_input", "Expected [-1,1], got [1]"),
    ),
    Bad(
        "two-prompts",
        {"text_input": raw("text_input", "BYTES", np.array([[b"a", b"b"]], object))},
        ("text_input", "Expected [-1,1], got [1,2]"),
    ),
    Bad(
        "two-temperatures",
        {"temperature": raw("temperature", "FP32", np.ones((1, 2), np.float32))},
        ("temperature", "Expected [-1,1], got [1,2]"),
    ),
    Bad(
        "no-temperature-in-the-tensor",
        {"temperature": raw("temperature", "FP32", np.ones((1, 0), np.float32))},
        ("temperature", "Expected [-1,1], got [1,0]"),
    ),
    Bad(
        "three-dimensions",
        {"seed": raw("seed", "UINT64", np.ones((1, 1, 1), np.uint64))},
        ("seed", "Expected [-1,1], got [1,1,1]"),
    ),
    Bad(
        "max_tokens-INT64",
        {"max_tokens": raw("max_tokens", "INT64", np.ones((1, 1), np.int64))},
        ("max_tokens", "'INT64'", "'INT32'"),
    ),
    Bad(
        "temperature-FP64",
        {"temperature": raw("temperature", "FP64", np.ones((1, 1)))},
        ("temperature", "'FP64'", "'FP32'"),
    ),
    Bad(
        "text-INT32",
        {"text_input": raw("text_input", "INT32", np.ones((1, 1), np.int32))},
        ("text_input", "'INT32'", "'BYTES'"),
    ),
    Bad(
        "ids-without-batch",
        {"input_ids": raw("input_ids", "INT32", np.ones(3, np.int32))},
        ("input_ids", "Expected [-1,-1], got [3]"),
        "scheduler",
    ),
    Bad(
        "unknown-input",
        {"top_q": raw("top_q", "FP32", np.ones((1, 1), np.float32))},
        ("unexpected inference input 'top_q'",),
    ),
    Bad("unknown-parameter", {"parameters": {"top_q": 1}}, ("'top_q'", "scenario, tenant")),
    Bad("parameter-of-another-type", {"parameters": {"tenant": 5}}, ("tenant: 5", "a string")),
    Bad("unknown-version", {"version": "7"}, ("version 7 is not found",)),
]


class Body(NamedTuple):
    """An HTTP request; Triton itself answers 500 to JSON of wrong types or to no JSON."""

    name: str
    body: dict[str, Any] | bytes
    status: int
    says: tuple[str, ...]
    path: str = GENERATE


BODIES = [
    Body("no-body", b"", 500, ("document is empty",)),
    Body("no-json", b'{"text_input": ', 500, ("failed to parse",)),
    Body("a-list", b"[1, 2]", 500, ("non-object",)),
    Body("a-string", b'"x"', 500, ("non-object",)),
    Body("nested-without-end", b'{"text_input":' + b"[" * 100_000, 500, ("failed to parse",)),
    Body("lone-surrogate", b'{"text_input": "\\ud800"}', 500, ("surrogate",)),
    Body("invalid-utf8", b'{"text_input": "ab\xff"}', 400, ("not valid UTF-8", "0xff", "offset 2")),
    Body(
        "parameter-invalid-utf8",
        b'{"text_input": "SECRET", "who": "a\xff"}',
        400,
        ("INVALID_ARG: 'who': invalid UTF-8 at byte 1",),
    ),
    Body(
        "parameter-name-invalid-utf8",
        b'{"text_input": "SECRET", "other": "SECRET", "wh\xfeo": 1}',
        400,
        ("INVALID_ARG: 'wh", "invalid UTF-8 at byte 2"),
    ),
    Body(
        "tenant-invalid-utf8",
        b'{"text_input": "SECRET", "tenant": "SECRET\xff"}',
        400,
        ("INVALID_ARG: tenant: invalid UTF-8 at byte 6",),
    ),
    Body(
        "id-invalid-utf8",
        b'{"text_input": "SECRET", "id": "\xff"}',
        400,
        ("INVALID_ARG: 'id': invalid UTF-8 at byte 0",),
    ),
    Body(
        "tokenizer-invalid-utf8",
        b'{"text_input": "SECRET\xff"}',
        400,
        ("not valid UTF-8", "offset 6"),
        "/v2/models/tokenizer/generate",
    ),
    Body(
        "unknown-field-long",
        {"text_input": "a", "SECRET" * 1000: "SECRET" * 1000},
        400,
        ("unknown field 'SECRET", "...; inputs allowed: text_input, chat"),
    ),
    Body("nothing-given", {}, 400, ("missing required input(s) ['text_input']",)),
    Body("twice", b'{"text_input": "a", "text_input": "b"}', 400, ("already exists",)),
    Body(
        "unknown-field",
        {"text_input": "a", "top_q": 1},
        400,
        ("'top_q' (did you mean top_", "tenant"),
    ),
    Body("bad-words", {"text_input": "a", "bad_words": "x"}, 400, ("bad_words: 'x'", "none")),
    Body("text-a-number", {"text_input": 5}, 500, (UNPARSABLE, "non-string")),
    Body("text-null", {"text_input": None}, 500, (UNPARSABLE, "non-string")),
    Body("text-an-object", {"text_input": {"a": 1}}, 500, (UNPARSABLE, "non-string")),
    Body("two-texts", {"text_input": ["a", "b"]}, 400, ("text_input: a batch of 2", "one prompt")),
    Body("max_tokens-a-word", {"text_input": "a", "max_tokens": "many"}, 500, (UNPARSABLE,)),
    Body("max_tokens-a-fraction", {"text_input": "a", "max_tokens": 1.5}, 500, (UNPARSABLE,)),
    Body("temperature-a-word", {"text_input": "a", "temperature": "hot"}, 500, (UNPARSABLE,)),
    Body("stream-a-word", {"text_input": "a", "stream": "yes"}, 500, (UNPARSABLE,)),
    Body("stream-a-number", {"text_input": "a", "stream": 1}, 500, (UNPARSABLE,)),
    Body("seed-negative", {"text_input": "a", "seed": -1}, 500, (UNPARSABLE,)),
    Body("seed-2**64", {"text_input": "a", "seed": 2**64}, 500, (UNPARSABLE,)),
    Body("stop-words-numbers", {"text_input": "a", "stop_words": [1]}, 500, (UNPARSABLE,)),
    Body(
        "float32-overflow",
        b'{"text_input": "a", "temperature": 1e39}',
        400,
        ("temperature: inf", "0.0 to 100.0"),
    ),
    Body("ids-a-word", {"input_ids": "a"}, 500, (UNPARSABLE,), "/v2/models/scheduler/generate"),
    Body(
        "detokenizer-id",
        {"output_ids": [49152]},
        400,
        ("output_ids: 49152", "0 to 49151"),
        "/v2/models/detokenizer/generate",
    ),
    Body(
        "detokenizer-batch",
        {"inputs": [{"name": "output_ids", "shape": [2, 1], "datatype": "INT32", "data": [1, 2]}]},
        400,
        ("output_ids: a batch of 2", "one prompt"),
        "/v2/models/detokenizer/infer",
    ),
    Body(
        "detokenizer-span",
        {"output_ids": [28, 29], "text_span": [1, 9]},
        400,
        ("text_span: 1, 9", "within 2 characters"),
        "/v2/models/detokenizer/generate",
    ),
    Body("tokenizer-empty", {"text_input": ""}, 400, ("empty",), "/v2/models/tokenizer/generate"),
    Body(
        "tokenizer-over-a-MiB",
        {"text_input": "a" * (2**20 + 1)},
        400,
        ("text_input: 1048577 bytes", "1048576"),
        "/v2/models/tokenizer/generate",
    ),
    Body(
        "tokenizer-batch",
        {
            "inputs": [
                {"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "data": ["a", "b"]}
            ]
        },
        400,
        ("text_input: a batch of 2", "one prompt"),
        "/v2/models/tokenizer/infer",
    ),
    Body(
        "unknown-version",
        {"text_input": "a"},
        404,
        ("version 7",),
        f"{GENERATE[:18]}/versions/7/generate",
    ),
]


def whole(bad: Bad) -> dict[str, Any]:
    """Return a valid request of the model with these fields replaced; None: left out."""
    prompt: dict[str, Any] = (
        {"input_ids": [1, 2]} if bad.model == "scheduler" else {"text_input": "a"}
    )
    return {name: value for name, value in {**prompt, **bad.fields}.items() if value is not None}


def check(message: str, says: tuple[str, ...]) -> None:
    for part in says:
        assert part in message
    assert not re.search(r"Traceback|server's log", message)


def over_grpc(server: Running, *cases: Bad) -> list[Answer | BaseException]:
    """Return the answers to all of them, sent side by side."""

    async def run() -> list[Answer | BaseException]:
        async with connected(server) as client:
            asked = (ask(client, bad.model, timeout=TIMEOUT_S, **whole(bad)) for bad in cases)
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(run())


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("bad", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks(emulated_server: Running) -> Iterator[None]:
    """Check that afterwards nothing is in use, and that no process has more files open."""
    burst(emulated_server)
    burst(emulated_server, "scheduler", input_ids=[1, 2, 3])
    burst(emulated_server, "ensemble")
    wait_idle(emulated_server, 2)
    before = files(emulated_server)
    yield
    burst(emulated_server)
    wait_idle(emulated_server, 2)
    wait_same_files(emulated_server, before, 3)


def burst(server: Running, model: str = "pdserve", **prompt: Any) -> list[str]:
    """Send valid requests side by side; return their answers."""

    def text(number: int) -> str:
        asked = prompt or {"text_input": f"question {number}"}
        return generate(server, model, max_tokens=12, **asked).text

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(text, range(32)))


def test_there_are_enough_of_them() -> None:
    assert len(VALUES) >= 40
    assert len(VALUES) + len(TENSORS) + len(BODIES) >= 90


@named(VALUES)
def test_http(emulated_server: Running, bad: Bad) -> None:
    with pytest.raises(Refused) as refused:
        generate(emulated_server, bad.model, **whole(bad))

    known = bad.model != "nope"
    assert refused.value.status == (400 if known else 404)
    assert str(refused.value).startswith("INVALID_ARG: ") is known
    check(str(refused.value), bad.says)


@named([bad for bad in VALUES if bad.model == "pdserve"])
def test_http_stream(emulated_server: Running, bad: Bad) -> None:
    with pytest.raises(Refused) as refused:
        list(generate_stream(emulated_server, bad.model, stream=True, **whole(bad)))

    assert refused.value.status == 400
    check(str(refused.value), bad.says)


@named(VALUES + TENSORS)
def test_grpc(emulated_server: Running, bad: Bad) -> None:
    (refused,) = over_grpc(emulated_server, bad)

    assert isinstance(refused, Refused)
    check(str(refused), bad.says)


@named(BODIES)
def test_http_body(emulated_server: Running, bad: Body) -> None:
    status, answer = post(emulated_server, bad.path, bad.body, TIMEOUT_S)

    assert status == bad.status, answer
    check(answer["error"], bad.says)


def test_the_log_holds_nothing_that_a_client_has_sent(emulated_server: Running) -> None:
    """A prompt may stand beside the invalid field."""
    for bad in BODIES:
        if b"SECRET" in (
            bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
        ):
            assert post(emulated_server, bad.path, bad.body, TIMEOUT_S)[0] == 400
    assert "SECRET" not in emulated_server.servers[0].read_log()


@pytest.mark.parametrize("model", ["prefill_0", "decode_0"])
def test_an_instance_ignores_an_id_that_is_not_utf8(emulated_server: Running, model: str) -> None:
    """The id is read first, so a failure there would leave its caller without an answer."""
    body = b'{"request": [1], "id": "a\xff"}'
    status, answer = post(emulated_server, f"/v2/models/{model}/generate", body, TIMEOUT_S)
    assert status == 200
    assert "reply" in str(answer)


def through(model: str, cases: list[Bad]) -> list[Bad]:
    """Return the requests to pdserve as requests to this model."""
    return [bad._replace(model=model) for bad in cases if bad.model == "pdserve"]


def test_the_ensemble_says_what_pdserve_says(emulated_server: Running) -> None:
    """Triton puts a preface before the error of a step."""
    cases = [bad for bad in VALUES + TENSORS if bad.name != "text-missing"]
    ours = over_grpc(emulated_server, *through("pdserve", cases))
    theirs = over_grpc(emulated_server, *through("ensemble", cases))

    assert len(theirs) >= 55
    for bad, one, other in zip(through("ensemble", cases), ours, theirs, strict=True):
        of_triton = str(one).replace("'pdserve'", "'ensemble'")
        assert isinstance(other, Refused), bad.name
        assert str(other) in (f"in ensemble 'ensemble', {one}", of_triton), bad.name


def test_the_ensemble_says_it_over_http(emulated_server: Running) -> None:
    for bad in BODIES:
        if bad.path == GENERATE and bad.name != "nothing-given":
            status, one = post(emulated_server, bad.path, bad.body, TIMEOUT_S)
            path = bad.path.replace("pdserve", "ensemble")
            other = post(emulated_server, path, bad.body, TIMEOUT_S)
            of_triton = one["error"].replace("'pdserve'", "'ensemble'")
            said = other[1]["error"]
            assert other[0] == status, (bad.name, other)
            assert said in (f"in ensemble 'ensemble', {one['error']}", of_triton), bad.name


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}], ids=["nothing", "something-else"])
def test_the_ensemble_misses_a_prompt(emulated_server: Running, fields: dict[str, Any]) -> None:
    """A request whose required input is missing would be answered with nothing at all."""
    (refused,) = over_grpc(emulated_server, Bad("", {"text_input": None, **fields}, (), "ensemble"))
    assert isinstance(refused, Refused)
    check(str(refused), ("in ensemble 'ensemble'", "missing required input(s) ['text_input']"))


@pytest.mark.parametrize("model", ["pdserve", "ensemble"])
def test_bad_ones_beside_good_ones_harm_none(emulated_server: Running, model: str) -> None:
    expected = burst(emulated_server, model)
    with ThreadPoolExecutor(2) as pool:
        good = [pool.submit(burst, emulated_server, model) for _ in range(4)]
        others = [bad for bad in VALUES + TENSORS if bad.model != "pdserve"]
        bad = [*through(model, VALUES + TENSORS), *others, *through(model, VALUES)]
        refused = over_grpc(emulated_server, *bad)

    assert [answers.result() for answers in good] == 4 * [expected]
    assert all(isinstance(error, Refused) for error in refused)


@pytest.mark.parametrize("instance", ["decode_0", "prefill_0", ""])
def test_nobody_but_a_watchdog_says_that_an_instance_is_lost(
    emulated_server: Running, instance: str
) -> None:
    """A forged notice would break everything that the instance is doing for others."""

    async def run() -> tuple[list[Answer], list[Any]]:
        async with connected(emulated_server) as client:
            asked = {"text_input": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
            streams = [asyncio.create_task(ask(client, **asked)) for _ in range(8)]
            await asyncio.sleep(0.05)
            said = [
                ask(client, text_input="a", parameters={"failure_notice": instance})
                for _ in range(5)
            ]
            refused = await asyncio.gather(*said, return_exceptions=True)
            return await asyncio.gather(*streams), refused

    answers, refused = asyncio.run(run())
    for error in refused:
        assert isinstance(error, Refused)
        assert str(error).startswith(
            "INVALID_ARG: failure_notice: only a watchdog of this deployment"
        )
    assert [answer.stats["attempts"] for answer in answers] == [1] * 8
