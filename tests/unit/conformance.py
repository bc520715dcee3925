"""Comparison of the classes of a ``tensorrt_llm``, real or fake, with the table of a version."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pdserve.config.llm_tables import Declared, Field, Table

FACTORY = object()
"""The default of a field that is made anew for each object."""
UNKNOWN = object()
"""A default that is no literal, such as a member of an enumeration."""
REQUIRED = inspect.Parameter.empty

Signature = dict[str, Any]
"""Names, with their defaults."""


def signatures() -> dict[str, Signature]:
    """Return what the classes of the importable ``tensorrt_llm`` take, by the names of a table."""
    package: Any = importlib.import_module("tensorrt_llm")
    llmapi: Any = importlib.import_module("tensorrt_llm.llmapi")
    found = {
        name: _taken(getattr(llmapi, name))
        for name in (
            *("DisaggregatedParams", "SamplingParams", "KvCacheConfig", "CacheTransceiverConfig"),
            *("TorchLlmArgs", "CompletionOutput"),
        )
    }
    found["generate_async"] = _taken(package.LLM.generate_async)
    found["generate_async"].pop("self", None)
    return found


def members() -> dict[str, set[str]]:
    """Return the names that objects of the importable ``tensorrt_llm`` have, by class."""
    llmapi: Any = importlib.import_module("tensorrt_llm.llmapi")
    classes = {
        "LLM": llmapi.LLM,
        "GenerationResult": llmapi.RequestOutput,
        "CompletionOutput": llmapi.CompletionOutput,
    }
    return {name: set(dir(of)) for name, of in classes.items()}


def _taken(of: Any) -> Signature:
    if dataclasses.is_dataclass(of):
        return {one.name: _default(one) for one in dataclasses.fields(of) if one.init}
    return {
        name: parameter.default
        for name, parameter in inspect.signature(of).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return FACTORY
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def declared_in(table: Table, name: str) -> Declared | None:
    """Return a class of a table, or the parameters of a method of ``LLM`` as one.

    None: the table does not have it.
    """
    if name != "generate_async":
        return table.classes.get(name)
    llm = table.classes.get("LLM")
    if llm is None or name not in llm.methods:
        return None
    return Declared(fields=llm.methods[name])


def differences(
    name: str, taken: Mapping[str, Any], declared: Declared, *, whole: bool
) -> Iterator[str]:
    """Yield how a signature differs from what a version declares.

    Args:
        whole: the signature must have every name that is declared.
    """
    expected = {field.alias or key: field for key, field in declared.fields.items() if field.init}
    for key, default in taken.items():
        if key in expected:
            wanted = _literal(expected[key])
            if UNKNOWN not in (wanted, default) and not _same(default, wanted):
                yield f"{name}.{key} is {default!r} by default, not {expected[key].default}"
        elif declared.complete and not key.startswith("_"):
            yield f"{name}.{key} does not exist"
    if whole and declared.complete:
        for key in expected:
            if key not in taken and not key.startswith("_"):
                yield f"{name}.{key} is missing"


def _literal(field: Field) -> Any:
    if field.default is None:
        return REQUIRED
    if field.default == "<factory>":
        return FACTORY
    try:
        return ast.literal_eval(field.default)
    except ValueError:
        return UNKNOWN


def _same(default: Any, wanted: Any) -> bool:
    # pydantic's signatures show a default that is made anew as that object.
    return wanted is FACTORY or (type(default) is type(wanted) and default == wanted)
