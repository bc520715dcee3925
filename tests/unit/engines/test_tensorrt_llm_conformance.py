"""Tests that fakes, options and the adapter keep to what versions of TensorRT-LLM declare.

The versions' tables are facts read from their source (``pdserve.config.llm_tables``), so this runs
where TensorRT-LLM is not installed; where it is, it is compared with the table of its version, too.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from packaging.version import Version

from pdserve.config import llm_tables
from pdserve.config.llm_options import CacheTransceiverConfig, KvCacheConfig, LlmArguments
from pdserve.config.llm_tables import Declared, Field, Table
from tests.fakes.importing import tensorrt_llm
from tests.unit import conformance
from tests.unit.conformance import declared_in, differences
from tests.unit.engines.test_tensorrt_llm_names import table as names_in_use

TABLES = llm_tables.versions()
# What goes from engine to engine, and what is called: the fake has all of it.
WHOLE = ("DisaggregatedParams", "generate_async")
OPTIONS: dict[str, type[msgspec.Struct]] = {
    "CacheTransceiverConfig": CacheTransceiverConfig,
    "KvCacheConfig": KvCacheConfig,
    "TorchLlmArgs": LlmArguments,
}
# Names that the adapter uses where a version has them, since not every version does.
CONDITIONAL = {
    "CacheTransceiverConfig": {
        *("transceiver_runtime", "kv_transfer_poll_interval_ms", "kv_cache_bounce_size_mb"),
        *("enable_pipelined_transfer", "agent_bounce_buffer_enable", "agent_bounce_params"),
    },
    "KvCacheConfig": {
        *("disk_cache_size", "disk_cache_path", "block_reuse_config", "mamba_state_config"),
        "use_kv_cache_manager_v2",
    },
    "TorchLlmArgs": {"enable_early_first_token_response"},
    "DisaggregatedParams": {"disagg_request_id"},
}
# The adapter always gives these itself, so that the library's default does not matter.
ALWAYS_GIVEN = {"CacheTransceiverConfig": {"backend"}}


def fakes() -> list[tuple[str, str]]:
    """Return the fake's versions with the version whose table is theirs.

    A version without a table of the same minor version is left out: what it has is not known.
    """
    with tensorrt_llm() as module:
        known: tuple[str, ...] = importlib.import_module(f"{module.__name__}.version").VERSIONS
    pairs = ((version, llm_tables.nearest(version)) for version in known)
    return [
        (fake, version)
        for fake, version in pairs
        if Version(fake).release[:2] == Version(version).release[:2]
    ]


def found(version: str, table: Table) -> list[str]:
    """Return how the fake of a version differs from a table."""
    with tensorrt_llm(version):
        return [
            difference
            for name, signature in conformance.signatures().items()
            if (declared := declared_in(table, name)) is not None
            for difference in differences(name, signature, declared, whole=name in WHOLE)
        ]


def used() -> dict[str, set[str]]:
    """Return the names that the adapter uses, by the class of a table."""
    listed = names_in_use()
    return {
        "TorchLlmArgs": listed["argument of LLM"],
        "KvCacheConfig": listed["KvCacheConfig"],
        "CacheTransceiverConfig": listed["CacheTransceiverConfig"],
        "SamplingParams": listed["SamplingParams"],
        "generate_async": listed["argument of generate_async"],
        "DisaggregatedParams": {
            name for name in listed["DisaggregatedParams"] if name.endswith(("_id", "_type"))
        },
    }


def absent(name: str, names: set[str], table: Table) -> set[str]:
    """Return the names that a class of a version is known not to take."""
    declared = declared_in(table, name)
    if declared is None or not declared.complete:
        return set()
    return names - declared.arguments


def renamed(table: Table, name: str, old: str, new: str) -> Table:
    """Return a table in which one field has another name."""
    declared = table.classes[name]
    fields = {new if key == old else key: field for key, field in declared.fields.items()}
    classes = {**table.classes, name: msgspec.structs.replace(declared, fields=fields)}
    return msgspec.structs.replace(table, classes=classes)


def test_there_are_tables() -> None:
    assert [Version(version).release[:2] for version in TABLES] == [(1, 2), (1, 3), (1, 4)]
    for version in TABLES:
        table = llm_tables.table(version)
        assert table.version == version
        for name in ("DisaggregatedParams", "CacheTransceiverConfig"):
            assert table.classes[name].complete, name


def test_each_fake_of_a_version_that_was_read_is_compared() -> None:
    assert {version for _, version in fakes()} >= set(TABLES[:2])


@pytest.mark.parametrize(("fake", "version"), fakes())
def test_the_fake_is_like_its_version(fake: str, version: str) -> None:
    assert found(fake, llm_tables.table(version)) == []


@pytest.mark.parametrize(("fake", "version"), fakes())
def test_the_fake_has_what_is_used_of_its_version(fake: str, version: str) -> None:
    """Otherwise the adapter would be tested without what it does where that exists."""
    table = llm_tables.table(version)
    with tensorrt_llm(fake):
        signatures = conformance.signatures()
    for name, names in used().items():
        declared = declared_in(table, name)
        if declared is not None:
            lacking = (names & declared.arguments) - set(signatures[name])
            assert not lacking, name


@pytest.mark.parametrize("version", TABLES)
def test_what_is_used_exists(version: str) -> None:
    table = llm_tables.table(version)
    for name, names in used().items():
        assert absent(name, names, table) <= CONDITIONAL.get(name, set()), name


@pytest.mark.parametrize("version", TABLES)
def test_what_is_called_exists(version: str) -> None:
    listed, table = names_in_use(), llm_tables.table(version)
    for name, kind in (
        ("LLM", "method of LLM"),
        ("GenerationResult", "result"),
        ("CompletionOutput", "CompletionOutput"),
    ):
        declared = table.classes.get(name)
        if declared is not None and declared.complete:
            names = {"__aiter__" if one == "async for" else one for one in listed[kind]}
            assert names <= declared.members, name


def test_what_is_called_was_read_in_some_version() -> None:
    listed = names_in_use()
    tables = [llm_tables.table(version) for version in TABLES]
    for name, kind in (("LLM", "method of LLM"), ("GenerationResult", "result")):
        read = {one for table in tables if name in table.classes
                for one in table.classes[name].members}  # fmt: skip
        assert {"__aiter__" if one == "async for" else one for one in listed[kind]} <= read, name


def test_what_is_conditional_is_so() -> None:
    """Every name declared as conditional is used, exists somewhere, and not everywhere."""
    for name, names in CONDITIONAL.items():
        assert names <= used()[name], name
        assert names <= llm_tables.anywhere(name), name
        assert not names & llm_tables.everywhere(name), name


@pytest.mark.parametrize("version", TABLES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_the_versions(version: str, name: str) -> None:
    """An option that is left at its default is not passed on, so the default must be theirs."""
    declared = llm_tables.table(version).classes[name]
    hints = get_type_hints(OPTIONS[name])
    for field in msgspec.structs.fields(OPTIONS[name]):
        theirs = declared.fields.get(field.name)
        if theirs is None:
            missing = absent(name, {field.name}, llm_tables.table(version))
            assert missing <= CONDITIONAL.get(name, set()), field.name
            continue
        ours = set(_choices(hints[field.name]))
        if theirs.choices:
            assert ours <= set(theirs.choices), field.name
        given = field.name in ALWAYS_GIVEN.get(name, set())
        if field.default not in (None, msgspec.NODEFAULT) and not given:
            simple = isinstance(field.default, (bool, int, float, str))
            assert not simple or repr(field.default) == theirs.default, field.name


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [one for one in get_args(hint) if isinstance(one, str)]
    return [one for inner in get_args(hint) for one in _choices(inner)]


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("DisaggregatedParams", "ctx_request_id"),
        ("SamplingParams", "end_id"),
        ("CacheTransceiverConfig", "kv_transfer_timeout_ms"),
        ("TorchLlmArgs", "tensor_parallel_size"),
    ],
)
def test_a_renamed_field_is_noticed(name: str, old: str) -> None:
    fake, version = fakes()[0]
    other = renamed(llm_tables.table(version), name, old, "renamed")
    before = set(found(fake, llm_tables.table(version)))
    assert f"{name}.{old} does not exist" in set(found(fake, other)) - before
    assert absent(name, used()[name] | {old}, other) >= {old}
    if name in WHOLE:
        assert f"{name}.renamed is missing" in found(fake, other)


def test_another_default_is_noticed() -> None:
    declared = Declared(fields={"a": Field("int", "1"), "b": Field("dict", "<factory>")})
    assert not list(differences("X", {"a": 1, "b": {}}, declared, whole=True))
    assert list(differences("X", {"a": True, "b": None}, declared, whole=True)) == [
        "X.a is True by default, not 1"
    ]
    assert list(differences("X", {"c": 1}, declared, whole=True)) == [
        "X.c does not exist", "X.a is missing", "X.b is missing",
    ]  # fmt: skip
    partial = msgspec.structs.replace(declared, complete=False)
    assert not list(differences("X", {"c": 1}, partial, whole=True))


def test_what_a_constructor_does_not_take_is_no_argument() -> None:
    declared = Declared(fields={"a": Field(alias="_a"), "b": Field(init=False)})
    assert declared.arguments == {"_a"}
    assert declared.members == {"a", "b"}


def test_the_nearest_table() -> None:
    oldest, middle, newest = TABLES
    assert llm_tables.nearest("1.0.0") == llm_tables.nearest("1.2.0") == oldest
    assert llm_tables.nearest("1.3.0rc1") == llm_tables.nearest("1.3.0") == middle
    assert llm_tables.nearest("1.4.0rc1") == llm_tables.nearest("2.0") == newest
    with pytest.raises(ValueError, match=r"no table of TensorRT-LLM 0\.1; there are: 1\.2\.1, "):
        llm_tables.table("0.1")


@pytest.fixture(scope="module")
def real() -> ModuleType:
    try:
        module = importlib.import_module("tensorrt_llm")
    except ImportError as error:
        pytest.skip(f"TensorRT-LLM is not installed: {error}")
    if getattr(module, "IS_FAKE", False):
        pytest.skip("the tensorrt_llm that is importable is the fake")
    return module


def test_the_installed_library_is_like_its_table(real: ModuleType) -> None:
    if real.__version__ not in TABLES:
        pytest.skip(
            f"TensorRT-LLM {real.__version__} has no table; make one with "
            "`python -m tensorrt_llm_tables`"
        )
    table = llm_tables.table(real.__version__)
    wrong = [
        difference
        for name, signature in conformance.signatures().items()
        if (declared := declared_in(table, name)) is not None
        for difference in differences(name, signature, declared, whole=True)
    ]
    assert not wrong


def test_the_installed_library_has_what_is_used(real: ModuleType) -> None:
    signatures, members, listed = conformance.signatures(), conformance.members(), names_in_use()
    for name, names in used().items():
        assert names - CONDITIONAL.get(name, set()) <= set(signatures[name]), name
    for name, kind in (("LLM", "method of LLM"), ("GenerationResult", "result")):
        assert {"__aiter__" if one == "async for" else one for one in listed[kind]} <= members[name]
