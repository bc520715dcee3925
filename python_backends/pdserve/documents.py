"""YAML as types, by PyYAML and msgspec; a key that stands twice in a mapping is an error.

PyYAML takes the last of them without a word: a section that was added at the end of a file would
silently replace the first one of that name.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")


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


def decode(data: bytes, type: type[T]) -> T:  # noqa: A002 - as msgspec.yaml.decode has it
    """Raises: msgspec.MsgspecError: not YAML, a key stands twice, or a value is not of its type."""
    try:
        found = yaml.load(data, _Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        raise msgspec.DecodeError(str(error)) from error
    return msgspec.convert(found, type)
