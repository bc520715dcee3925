"""Tests for the values of ``text_input``, with and without ``chat``."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import InvalidRequest
from pdserve.text.tokenizer import parse_prompt


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@given(st.text(min_size=1))
def test_without_chat_the_text_is_the_prompt(text: str) -> None:
    assert parse_prompt(text.encode(), chat=False) == text


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}
        )
    ),
    st.sampled_from(["system", "user"]),
    st.booleans(),
)
def test_a_json_list_is_a_conversation(
    turns: list[dict[str, str]], last: str, ascii_only: bool
) -> None:
    turns = [*turns, {"role": last, "content": "?"}]
    text = "\n " + json.dumps(turns, ensure_ascii=ascii_only)
    assert parse_prompt(text.encode(), chat=True) == turns
    assert parse_prompt(text.encode(), chat=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "Why is the sky blue?",
        " \n",
        "\0",
        '{"role": "user", "content": "x"}',
        '"[{"',
        "17",
        "null",
        "[1, 2, 3] is what?",
        "[ ] a task, [x] a done one",
        "[" * 100_000,
    ],
)
def test_any_other_text_is_one_user_turn(text: str) -> None:
    assert parse_prompt(text.encode(), chat=True) == user(text)


TURN = '{"role": "user", "content": "x"}'


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "text_input is empty"),
        (b"\xff", "not valid UTF-8: byte 0xff at offset 0"),
        (b"abc\xe4\xb8", "not valid UTF-8: byte 0xe4 at offset 3"),
        (b"\xed\xa0\x80", "not valid UTF-8: byte 0xed at offset 0"),
        (b"[]", "Expected `array` of length >= 1"),
        (b"[1, 2]", "Expected `object`, got `int` - at `$[0]`"),
        (b"[null]", "Expected `object`, got `null` - at `$[0]`"),
        (b"[{}]", "missing required field `role` - at `$[0]`"),
        (b'[{"role": "user"}]', "missing required field `content` - at `$[0]`"),
        (f'[{TURN}, {{"role": "tool", "content": ""}}]', "'tool' - at `$[1].role`"),
        (f'[{TURN}, {{"role": 1, "content": ""}}]', "at `$[1].role`"),
        ('[{"role": "user", "content": 1}]', "Expected `str`, got `int` - at `$[0].content`"),
        ('[{"role": "user", "content": null}]', "got `null` - at `$[0].content`"),
        ('[{"role": "user", "content": [1]}]', "got `array` - at `$[0].content`"),
        ('[{"role": "user", "content": "", "name": ""}]', "unknown field `name` - at `$[0]`"),
        (f'[{TURN}, {{"role": "assistant", "content": ""}}]', "text_input[1].role is 'assistant'"),
        (f"[{TURN}", f"bad JSON chat of {len(TURN) + 1} bytes"),
        (f"[{TURN}] x", "trailing characters (byte 36)"),
        (f" [ {TURN},]", "bad JSON chat"),
        (f"[{TURN} {TURN}]", f"(byte {len(TURN) + 2})"),
        (b'[{"role": "user", "content": "a\nb"}]', "(byte 31)"),
        (b'[{"role": "user", "content": "\\ud800 alone"}]', "bad JSON chat"),
        (b'[{"role": "user", "content": "\\udc00 alone"}]', "bad JSON chat"),
        (b"[{" * 100_000, "bad JSON chat"),
        (b'[{"":' * 100_000, "bad JSON chat"),
    ],
)
def test_bad_prompts_name_what_is_wrong(data: bytes | str, expected: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_prompt(data.encode() if isinstance(data, str) else data, chat=True)
    assert expected in str(error.value)


def test_a_wrong_item_is_answered_with_the_allowed_values_in_a_short_message() -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_prompt(json.dumps([{"role": "x" * 100_000}]).encode(), chat=True)
    message = str(error.value)
    assert "at `$[0].role`" in message
    assert all(role in message for role in ("system", "user", "assistant"))
    assert len(message) < 1000


@given(st.binary(), st.booleans())
def test_any_bytes_are_a_prompt_or_an_invalid_request(data: bytes, chat: bool) -> None:
    try:
        prompt = parse_prompt(data, chat)
    except InvalidRequest:
        return
    assert prompt in (data.decode(), user(data.decode())) or json.loads(data) == prompt
