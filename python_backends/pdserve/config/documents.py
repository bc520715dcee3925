"""Conversion of YAML to types, by PyYAML and msgspec.

Each plain scalar is read by the type of its field (see ``scalars``). An error names the key or the
value, its place and its line, and what is allowed. A duplicate key in a mapping is an error: PyYAML
silently takes the last one, and a section that was added at the end of a file would replace the
first one of that name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import inspect

from pdserve.config import scalars

T = TypeVar("T")
_PLACE = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_NUMBER = re.compile(r"\[[0-9]+\]")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no field has such a key
            line = key.start_mark.line + 1
            if key.value in lines:
                raise msgspec.DecodeError(
                    f"key {key.value!r} stands twice, in lines {lines[key.value]} and {line}"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def decode(
    data: bytes,
    type: type[T],  # noqa: A002 - as msgspec.yaml.decode has it
    explained: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """Read a document as this type.

    Args:
        explained: keys that are not allowed, by their place (``gateway.policy``,
            ``servers[].policy``), with the explanation for the error on each.

    Raises:
        msgspec.MsgspecError: it is not YAML, a key is duplicate or unknown, or a value has a wrong
            type.
    """
    info = inspect.type_info(type)
    keys = _Keys(info, explained)
    root = None
    try:
        loader = _Loader(data)
        try:
            root = loader.get_single_node()
            if root is None:
                raise msgspec.DecodeError("it is empty")
            found = loader.construct_document(_fitted(root, info, "$", keys))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise msgspec.DecodeError(str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, msgspec.MsgspecError):
            raise
        # PyYAML raises these for a value that does not have the type of its tag.
        raise msgspec.DecodeError(f"a value is not as its tag says: {error}") from error
    except RecursionError as error:
        raise msgspec.DecodeError("it is nested too deeply") from error
    try:
        return msgspec.convert(found, type)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(f"{error}{_given(root, str(error))}") from error


def _fitted(node: yaml.Node, info: inspect.Type, place: str, keys: _Keys) -> yaml.Node:
    """Return the node with each plain scalar converted for its field.

    Raises:
        msgspec.ValidationError: no field has that key, or the scalar has no meaning for its field.
    """
    if isinstance(info, inspect.UnionType):
        null = node.tag.endswith(":null")
        others = [one for one in info.types if not isinstance(one, inspect.NoneType)]
        return node if null or len(others) > 1 else _fitted(node, others[0], place, keys)
    if isinstance(node, yaml.ScalarNode):
        try:
            return scalars.fitted(node, info)
        except ValueError as error:
            raise msgspec.ValidationError(f"{error} - at `{place}`, {_line(node)}") from error
    if isinstance(node, yaml.SequenceNode) and isinstance(
        info, inspect.VarTupleType | inspect.ListType
    ):
        items = [
            _fitted(item, info.item_type, f"{place}[{number}]", keys)
            for number, item in enumerate(node.value)
        ]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if isinstance(node, yaml.MappingNode) and isinstance(
        info, inspect.StructType | inspect.DictType
    ):
        pairs = [_pair(key, value, info, place, keys) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
    return node


def _pair(
    key: yaml.Node,
    value: yaml.Node,
    info: inspect.StructType | inspect.DictType,
    place: str,
    keys: _Keys,
) -> tuple[yaml.Node, yaml.Node]:
    """Convert a key and its value in a mapping of this type."""
    if key.tag == _MERGE:
        merged = inspect.ListType(info) if isinstance(value, yaml.SequenceNode) else info
        return key, _fitted(value, merged, place, keys)
    if not isinstance(key, yaml.ScalarNode):
        return key, value
    inside = f"{place}.{key.value}"
    if isinstance(info, inspect.DictType):
        return scalars.fitted(key, info.key_type), _fitted(value, info.value_type, inside, keys)
    fields = {field.encode_name: field.type for field in info.fields}
    if key.value not in fields:
        raise msgspec.ValidationError(
            f"unknown key {key.value!r} - at `{place}`, {_line(key)}; "
            f"{keys.meant(inside, key.value, list(fields))}allowed: {', '.join(fields)}"
        )
    return scalars.as_text(key), _fitted(value, fields[key.value], inside, keys)


@dataclass(frozen=True)
class _Keys:
    """The keys that a document may have, and explanations of others."""

    document: inspect.Type
    explained: Mapping[str, str]

    def meant(self, place: str, key: str, fields: list[str]) -> str:
        """Return what the writer of an unknown key may have meant."""
        explanation = self.explained.get(_NUMBER.sub("[]", place.removeprefix("$.")))
        if explanation is not None:
            return f"{explanation}; "
        homes = sorted(set(_homes(key, self.document, "")))
        close = homes or difflib.get_close_matches(key, fields, n=1)
        return f"did you mean {' or '.join(close)}? " if close else ""


def _homes(key: str, info: inspect.Type, place: str) -> Iterator[str]:
    """Yield the places in a document where a key of this name is allowed."""
    if isinstance(info, inspect.UnionType):
        for one in info.types:
            yield from _homes(key, one, place)
    elif isinstance(info, inspect.VarTupleType):
        yield from _homes(key, info.item_type, f"{place}[]")
    elif isinstance(info, inspect.StructType):
        for field in info.fields:
            inside = f"{place}.{field.encode_name}".lstrip(".")
            if field.encode_name == key:
                yield inside
            yield from _homes(key, field.type, inside)


def _given(node: yaml.Node | None, message: str) -> str:
    """Return the value at the place that an error of msgspec names, and its line."""
    found = _PLACE.search(message)
    for name, index in _STEP.findall(found[1] if found else ""):
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == name), None)
        elif isinstance(node, yaml.SequenceNode) and index:
            node = node.value[int(index)]
        else:
            node = None
    if found is None or node is None:
        return ""
    shown = f"; given: {node.value!r}" if isinstance(node, yaml.ScalarNode) else ""
    return f", {_line(node)}{shown}"


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
