"""Tests for YAML scalars, each of which is read as the type of its field."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest
from msgspec import Struct, inspect

from pdserve import config
from pdserve.config import documents
from pdserve.config.deployment import FORMER_KEYS
from pdserve.config.llm_options import ELSEWHERE
from pdserve.engines.emulated import Profile
from pdserve.errors import DeploymentError

if TYPE_CHECKING:
    from pathlib import Path

TRUE = ("on", "On", "yes", "true", "TRUE", "y")
FALSE = ("off", "OFF", "no", "No", "false", "n")


class Fields(Struct, forbid_unknown_fields=True):
    text: str | None = "-"
    several: tuple[str, ...] = ()
    switch: bool | None = None
    choice: Literal["off", "on", "auto"] | None = None
    count: int | None = None
    measure: float | None = None
    by_name: dict[str, float] = {}


def read(line: str) -> Any:
    """Return the only field that a line of YAML gives."""
    made = documents.decode(line.encode(), Fields)
    return getattr(made, line.partition(":")[0])


@pytest.mark.parametrize(
    "word",
    [*TRUE, *FALSE, "1", "1e3", "0x10", "010", "1_000", "1:30", "127.1", ".inf", "2026-11-29"],
)
def test_text_is_what_is_written(word: str) -> None:
    assert read(f"text: {word}") == word
    assert read(f"several: [{word}, x]") == (word, "x")
    assert read(f"by_name: {{{word}: 1}}") == {word: 1.0}


def test_nothing_stays_nothing() -> None:
    assert read("text: null") is None
    assert read("text:") is None
    assert read("text: 'null'") == "null"


@pytest.mark.parametrize("word", [*TRUE, *FALSE])
def test_a_switch_takes_every_word_for_it(word: str) -> None:
    assert read(f"switch: {word}") is (word in TRUE)


@pytest.mark.parametrize("word", [*TRUE[:-1], *FALSE[:-1]])
def test_a_choice_of_off_and_on_takes_them_too(word: str) -> None:
    assert read(f"choice: {word}") == ("on" if word in TRUE else "off")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("count: 1e3", 1000),
        ("count: 0x10", 16),
        ("count: 1_000", 1000),
        ("count: 8.0", 8),
        ("count: 0", 0),
        ("count: -3", -3),
        ("measure: 1e3", 1000.0),
        ("measure: 1e-3", 0.001),
        ("measure: 2", 2.0),
        ("measure: 0.5", 0.5),
    ],
)
def test_numbers(line: str, value: float) -> None:
    assert read(line) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("count: 010", "010 is octal in YAML 1.1 and decimal in YAML 1.2"),
        ("measure: 010", "010 is octal"),
        ("count: 1:30", "1:30 counts by sixties"),
        ("measure: 1:30.5", "1:30.5 counts by sixties"),
        ("measure: .inf", r"\.inf is not finite"),
        ("measure: -.INF", "not finite"),
        ("measure: .nan", "not finite"),
        ("measure: 1e999", "1e999 is not finite"),
        ("count: 8.5", r"Expected `int.*`, got `float` - at `\$\.count`, line 1; given: '8.5'"),
        ("count: '8'", "Expected `int.*`, got `str`"),
        ("count: 2026-02-31", "Expected `int.*`, got `str`.*given: '2026-02-31'"),
        ("count: !!int eight", "not as its tag says"),
        ("switch: maybe", "Expected `bool.*`, got `str`.*given: 'maybe'"),
        ("switch: 'yes'", "Expected `bool.*`, got `str`"),
        (
            "choice: never",
            r"'never' is not allowed; allowed: auto, off, on - at `\$\.choice`, line",
        ),
        ("text: [", "while parsing"),
        ("count: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_a_field_cannot_mean_is_refused(line: str, message: str) -> None:
    with pytest.raises(msgspec.MsgspecError, match=f"(?s){message}"):
        read(line)


def test_merged_keys_are_read_as_fields_too() -> None:
    text = b"- &first {choice: off, text: no}\n- {<<: *first, text: on}\n- {<<: [*first]}\n"
    made = documents.decode(text, list[Fields])
    assert [(one.choice, one.text) for one in made] == [("off", "no"), ("off", "on"), ("off", "no")]


DEPLOYMENT = "model: m\nservers:\n- {name: a, prefill: [no], decode: [on]}\n"


def test_every_default_of_a_deployment_can_be_written_plainly() -> None:
    """A reader who writes a default as the documentation gives it gets that default."""
    document = msgspec.to_builtins(documents.decode(DEPLOYMENT.encode(), config.Deployment))

    def plain(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(plain, value)) + "]"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "null" if value is None else str(value)

    read_back = documents.decode(plain(document).encode(), config.Deployment)
    assert msgspec.to_builtins(read_back) == document
    assert read_back.gateway.local == "off"
    assert list(read_back.instances("prefill")) == ["no"]


def test_every_choice_of_every_document_can_be_written_plainly() -> None:
    def choices(info: inspect.Type) -> list[inspect.LiteralType]:
        if isinstance(info, inspect.LiteralType):
            return [info]
        parts: tuple[inspect.Type, ...] = ()
        if isinstance(info, inspect.UnionType):
            parts = info.types
        elif isinstance(info, inspect.StructType):
            parts = tuple(field.type for field in info.fields)
        elif isinstance(info, inspect.VarTupleType):
            parts = (info.item_type,)
        return [choice for part in parts for choice in choices(part)]

    found = choices(inspect.type_info(config.Deployment)) + choices(inspect.type_info(Profile))
    assert len(found) > 8
    for choice in found:
        for value in choice.values:
            kind = Literal[value]  # type: ignore[valid-type]
            assert documents.decode(f"[{value}]".encode(), list[kind]) == [value]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "decode: {slotz: 3}",
            r"unknown key 'slotz' - at `\$\.decode`, line 4; did you mean slots\? allowed: slots",
        ),
        ("slots: 3", r"unknown key 'slots' - at `\$`, .*did you mean decode.slots or prefill.slot"),
        ("on: 3", r"unknown key 'on' - at `\$`, line 4; allowed: model, servers, "),
        ("gateway: {host: x}", r"did you mean servers\[\]\.host\?"),
        (
            "prefill: {slots: 0}",
            r"Expected `int` >= 1 - at `\$\.prefill\.slots`, line 4; given: '0",
        ),
        ("decode: {slots: 99999999999999999999}", r"at `\$\.decode\.slots`.*given: '9999999999999"),
        ("engine: {load_s: 1e300}", r"at `\$\.engine\.load_s`, line 4; given: '1e300'"),
        ('gateway: {default_scenario: "a\\n"}', r"default_scenario`, line 4; given: 'a\\n'"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(added: str, message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        documents.decode(f"{DEPLOYMENT}{added}\n".encode(), config.Deployment)


def test_a_key_that_is_gone_is_named_with_where_to_look_now(tmp_path: Path) -> None:
    """A file written for an older version is refused, and the error says what to change."""
    file = tmp_path / "deployment.yaml"
    for key, value in {"policy": "on_demand", "report_ms": "50"}.items():
        file.write_text(f"{DEPLOYMENT}gateway:\n  stall_s: 3\n  {key}: {value}\n")
        with pytest.raises(DeploymentError) as raised:
            config.load(file)
        message = str(raised.value)
        assert f"unknown key '{key}' - at `$.gateway`, line 6; this key was removed: " in message
        assert "perf/baselines" in message
        assert "did you mean" not in message


def test_former_keys_are_found_at_any_number_and_hide_no_key_of_today() -> None:
    former = {"servers[].color": "servers have none"}
    document = DEPLOYMENT.replace("name: ", "color: red, name: ", 1)
    assert document != DEPLOYMENT
    with pytest.raises(msgspec.ValidationError, match=r"servers\[0\]`.*; servers have none; allow"):
        documents.decode(document.encode(), config.Deployment, former)
    for place in (*FORMER_KEYS, *ELSEWHERE):
        section, key = place.rsplit(".", 1)
        of = operator.attrgetter(section)(config.Deployment("m", ()))
        assert key not in of.__struct_fields__
