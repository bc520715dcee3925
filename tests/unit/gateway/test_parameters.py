"""Tests for request parameters: each field at, below and above its bounds, and the error's text."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from pdserve import config
from pdserve.errors import InvalidRequest
from pdserve.gateway.parameters import (
    DEFAULT_MAX_TOKENS,
    MAX_LABEL_BYTES,
    MAX_STOP_BYTES,
    PARAMETERS,
    Parameters,
    answer_length,
    parse,
    sampling,
    scalar,
)
from pdserve.sampling import Sampling

DTYPES: dict[str, Any] = {
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.uint64,
    "random_seed": np.uint64,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "stop_words": object,
    "stream": bool,
    "ignore_eos": bool,
    "scenario": object,
    "tenant": object,
    "priority": np.int32,
    "ttft_limit_ms": np.int32,
}
INT32 = 2**31 - 1
TINY = float(np.finfo(np.float32).smallest_subnormal)
BELOW_1 = float(np.nextafter(np.float32(1), np.float32(0)))
ABOVE_1 = float(np.nextafter(np.float32(1), np.float32(2)))


def tensor(name: str, *values: Any) -> np.ndarray[Any, Any]:
    """Return a value as Triton passes it: with a batch dimension."""
    return np.array([values], dtype=DTYPES[name])


def parsed(extra: dict[str, Any] | None = None, **fields: Any) -> Parameters:
    tensors = {name: tensor(name, value) for name, value in fields.items()}
    return parse(tensors, extra or {}, max_stop_words=4, inputs=tuple(DTYPES))


def field(parameters: Parameters, name: str) -> Any:
    return getattr(parameters, name) if hasattr(parameters, name) else parameters.sampling[name]


def test_what_is_not_given_is_left_to_the_scenario() -> None:
    assert parsed() == Parameters(
        max_tokens=None,
        sampling={},
        stop=(),
        stream=False,
        ignore_eos=False,
        scenario="",
        tenant="",
        priority=None,
        ttft_limit_ms=None,
        timeout_us=0,
    )


def test_what_no_scenario_says_either_is_greedy() -> None:
    assert Sampling(**msgspec.structs.asdict(config.SamplingDefaults())) == Sampling()


@pytest.mark.parametrize("name", [*config.SamplingDefaults.__struct_fields__])
def test_a_scenario_may_set_what_a_client_may_ask_for(name: str) -> None:
    values = [-3, -2, -1, 0, TINY, 0.5, 1, ABOVE_1, 2, 3, 10, 11, 100, 101, 1 << 24, (1 << 24) + 1]
    allowed = []
    for value in values:
        try:
            parsed(**{name: value})
        except InvalidRequest:
            continue
        off = name == "top_p" and value == 0  # how TensorRT-LLM's clients leave a value out
        if not off and (type(value) is int or DTYPES[name] is np.float32):
            allowed.append(value)
    for value in values:
        try:
            made = msgspec.convert({name: value}, config.SamplingDefaults)
        except msgspec.ValidationError:
            assert value not in allowed
        else:
            assert value in allowed
            assert getattr(made, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0.0),
        ("temperature", -0.0),
        ("temperature", TINY),
        ("temperature", 100.0),
        ("top_k", 0),
        ("top_k", 1 << 24),
        ("top_p", 0.0),
        ("top_p", TINY),
        ("top_p", 1.0),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("repetition_penalty", TINY),
        ("repetition_penalty", 10.0),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("stream", True),
        ("ignore_eos", True),
        ("priority", -(2**31)),
        ("priority", INT32),
        ("ttft_limit_ms", 1),
        ("ttft_limit_ms", INT32),
    ],
)
def test_allowed(name: str, value: Any) -> None:
    got = field(parsed(**{name: value}), name)
    assert got == value
    assert type(got) is type(value), "a Python value, not a numpy one"


NOT_FINITE = [
    (name, value, shown)
    for name in (
        "temperature",
        "top_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    for value, shown in ((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"))
]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("temperature", -TINY, "-1.4012985e-45"),
        ("temperature", -0.1, "-0.1"),
        ("temperature", 100.00001, "100.00001"),
        ("temperature", 3e38, "3e+38"),
        ("top_k", -1, "-1"),
        ("top_k", (1 << 24) + 1, "16777217"),
        ("top_k", INT32, "2147483647"),
        ("top_p", -TINY, "-1.4012985e-45"),
        ("top_p", -0.5, "-0.5"),
        ("top_p", ABOVE_1, "1.0000001"),
        ("repetition_penalty", 0.0, "0"),
        ("repetition_penalty", -1.0, "-1"),
        ("repetition_penalty", 10.000001, "10.000001"),
        ("presence_penalty", -2.0000002, "-2.0000002"),
        ("presence_penalty", 2.0000002, "2.0000002"),
        ("frequency_penalty", -3.0, "-3"),
        ("frequency_penalty", 1e30, "1e+30"),
        ("ttft_limit_ms", 0, "0"),
        ("ttft_limit_ms", -(2**31), "-2147483648"),
        *NOT_FINITE,
    ],
)
def test_not_allowed(name: str, value: Any, shown: str) -> None:
    """The error names the field, its value and what is allowed."""
    allowed = {
        "temperature": "from 0.0 to 100.0",
        "top_k": "from 0 to 16777216",
        "top_p": "from 0.0 to 1.0",
        "repetition_penalty": "more than 0.0 to 10.0",
        "presence_penalty": "from -2.0 to 2.0",
        "frequency_penalty": "from -2.0 to 2.0",
        "ttft_limit_ms": "from 1 to 2147483647",
    }[name]
    with pytest.raises(InvalidRequest) as caught:
        parsed(**{name: value})
    assert str(caught.value) == f"{name}: {shown}; allowed: {allowed}"
    assert caught.value.code == "INVALID_ARG"


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "stop_words"])
@pytest.mark.parametrize("count", [0, 2])
def test_one_value_exactly(name: str, count: int) -> None:
    values = [b"a" if DTYPES[name] is object else 1] * count
    with pytest.raises(InvalidRequest, match=rf"^{name}: {count} values given; exactly 1 is"):
        parse({name: tensor(name, *values)}, {}, 4, ())


def test_scalar() -> None:
    assert scalar({}, "top_k") is None
    assert scalar({"top_k": np.array(3)}, "top_k") == 3
    assert scalar({"x": np.array([[b"a"]], object)}, "x") == b"a"


# ------------------------------------------------------------------------------ seed, and top_p off


def test_random_seed_is_the_seed() -> None:
    assert parsed(random_seed=7) == parsed(seed=7) == parsed(seed=7, random_seed=7)
    assert parsed(random_seed=0).sampling == {"seed": 0}
    with pytest.raises(InvalidRequest) as caught:
        parsed(seed=7, random_seed=0)
    assert str(caught.value) == "random_seed: 0; allowed: what seed says, 7, or none"


def test_top_p_0_is_off() -> None:
    scenario = msgspec.structs.asdict(config.SamplingDefaults(temperature=0.5, top_p=0.25))
    assert sampling({}, scenario).top_p == 0.25
    assert sampling(parsed(top_p=0.0).sampling, scenario) == Sampling(temperature=0.5)
    assert sampling(parsed(top_p=0.5).sampling, scenario).top_p == 0.5


# ------------------------------------------------------------------------------------------ routing


def test_routing_by_tensor_or_by_parameter() -> None:
    by_tensor = parsed(scenario=b"chat", tenant="Zürich".encode(), priority=-3)
    assert (by_tensor.scenario, by_tensor.tenant, by_tensor.priority) == ("chat", "Zürich", -3)
    by_parameter = parsed({"scenario": "chat", "tenant": "Zürich", "priority": -3})
    assert by_parameter == by_tensor
    both = parsed({"tenant": "other", "priority": 9}, tenant=b"acme")
    assert (both.tenant, both.priority) == ("acme", 9), "the tensor takes precedence"


def test_an_empty_label_is_none() -> None:
    assert parsed(scenario=b"") == parsed({"scenario": ""}) == parsed()


@pytest.mark.parametrize("name", ["scenario", "tenant"])
@pytest.mark.parametrize(
    "value",
    ["a" * (MAX_LABEL_BYTES + 1), "é" * 33, "a\nb", "a\0", "\x7f", "\u200b", "a\ud800"],
)
def test_labels_are_short_and_printable(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed({name: value})
    quoted = f"{value[:64]!r}" + "..." * (len(value) > 64)
    assert str(caught.value) == f"{name}: {quoted}; allowed: printable, up to 64 bytes"
    str(caught.value).encode()  # the message goes to the client
    assert field(parsed({name: "é" * 32}), name) == "é" * 32


@pytest.mark.parametrize("name", ["scenario", "tenant"])
@pytest.mark.parametrize(
    ("value", "at"), [(b"\xff", 0), (b"ab\xc3", 2), (b"\xed\xa0\x80", 0), (b"a\xc0\xaf", 1)]
)
def test_labels_are_utf8(name: str, value: bytes, at: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: invalid UTF-8 at byte {at}$"):
        parsed(**{name: value})


@pytest.mark.parametrize("name", ["scenario", "tenant"])
@pytest.mark.parametrize("value", [7, 1.5, True, None, ["a"]])
def test_labels_are_strings(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: .*; a string is allowed$"):
        parsed({name: value})


@pytest.mark.parametrize("value", ["7", 1.5, True, None, "", math.nan])
def test_priority_is_an_integer(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed({"priority": value})
    assert str(caught.value) == f"priority: {value!r}; an integer is allowed"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "timeout: -1; allowed: 0 or more microseconds"),
        ("9", "timeout: '9'; an integer is allowed"),
        (0.5, "timeout: 0.5; an integer is allowed"),
        (None, "timeout: None; an integer is allowed"),
    ],
)
def test_timeout_as_a_parameter(value: Any, message: str) -> None:
    assert parsed({"timeout": 250_000}).timeout_us == 250_000
    assert parsed({"timeout": 0}) == parsed()
    with pytest.raises(InvalidRequest) as caught:
        parsed({"timeout": value})
    assert str(caught.value) == message


def test_huge_priority_is_only_a_number() -> None:
    assert parsed({"priority": 10**30}).priority == 10**30


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lora", ""),
        ("Stream", " (did you mean stream?)"),
        ("temprature", " (did you mean temperature?)"),
        ("prioritys", " (did you mean priority?)"),
        ("bad_words", " (did you mean stop_words?)"),
        ("min_length", ""),
    ],
)
def test_unknown_parameters_are_refused_by_name(name: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed({name: 3})
    assert str(caught.value) == (
        f"unknown field {name!r}{meant}; inputs allowed: {', '.join(DTYPES)}; "
        f"request parameters allowed: {', '.join(PARAMETERS)}"
    )


def test_an_input_among_the_parameters_is_said_to_be_one() -> None:
    with pytest.raises(InvalidRequest, match=r"^max_tokens is an input, and no request parameter$"):
        parsed({"max_tokens": 5})


def test_empty_parameters_of_other_backends_clients_are_none() -> None:
    assert parsed({"bad_words": "", "stop_words": "", "embedding_bias": None}) == parsed()
    assert parsed({"id": "42"}) == parsed(), "HTTP's generate leaves it there"


# --------------------------------------------------------------------------------------- stop words


def stops(*words: bytes) -> tuple[str, ...]:
    tensors = {"stop_words": tensor("stop_words", *words)}
    return parse(tensors, {}, max_stop_words=4, inputs=tuple(DTYPES)).stop


def test_stop_words() -> None:
    assert stops(b"END", "終".encode(), b"\n\n", b" ") == ("END", "終", "\n\n", " ")


def test_empty_stop_words_are_none() -> None:
    assert stops() == stops(b"") == stops(b"", b"") == ()
    assert stops(b"", b"a", b"", b"b", b"c", b"d", b"") == ("a", "b", "c", "d")


def test_too_many_stop_words() -> None:
    with pytest.raises(InvalidRequest, match=r"^stop_words: 5 given; at most 4 are allowed$"):
        stops(b"a", b"b", b"c", b"d", b"e")


def test_long_stop_words() -> None:
    assert stops("é".encode() * (MAX_STOP_BYTES // 2))
    with pytest.raises(InvalidRequest) as caught:
        stops(b"x" * (MAX_STOP_BYTES + 1))
    assert str(caught.value) == (
        f"stop_words: {'x' * 32!r}... has 257 bytes; at most 256 are allowed"
    )


@pytest.mark.parametrize("word", [b"\xff", b"\x80abc", "終".encode()[:2]])
def test_stop_words_are_utf8(word: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^stop_words: invalid UTF-8 at byte 0$"):
        stops(b"fine", word)


# ------------------------------------------------------------------------------------ answer length


@pytest.mark.parametrize(
    ("asked", "otherwise", "prompt", "length"),
    [
        (None, None, 10, DEFAULT_MAX_TOKENS),
        (None, None, 900, 100),
        (None, None, 999, 1),
        (None, 300, 10, 300),
        (None, 300, 900, 100),
        (1, 300, 10, 1),
        (1, None, 10, 1),
        (990, None, 10, 990),
        (1, None, 999, 1),
    ],
)
def test_answer_length(asked: int | None, otherwise: int | None, prompt: int, length: int) -> None:
    assert answer_length(asked, otherwise, prompt, context_length=1000) == length


@pytest.mark.parametrize("asked", [0, -1, -(2**31), 991, INT32])
def test_answer_length_not_allowed(asked: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        answer_length(parsed(max_tokens=asked).max_tokens, None, 10, context_length=1000)
    assert str(caught.value) == (
        f"max_tokens: {asked}; allowed: 1 to 990 after a prompt of 10 tokens"
    )


@pytest.mark.parametrize("prompt", [1000, 1001, 10**6])
def test_prompt_that_leaves_no_room(prompt: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        answer_length(None, None, prompt, context_length=1000)
    assert str(caught.value) == f"the prompt has {prompt} tokens; at most 999 are allowed"
