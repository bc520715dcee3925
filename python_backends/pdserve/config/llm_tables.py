"""The names that versions of TensorRT-LLM have, as facts: fields, defaults, choices, methods.

Each ``llm_versions/VERSION.json`` is what ``python -m tensorrt_llm_tables`` has read of that
version. So names can be checked where TensorRT-LLM is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
from msgspec import Struct
from packaging.version import Version

FOLDER = Path(__file__).with_name("llm_versions")


class Field(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A field of a class, or a parameter of a method.

    ``type`` and ``default`` are Python source; ``<factory>`` is a default made for each object. A
    field without a default must be given. ``alias`` is the name that the constructor takes instead.
    """

    type: str = ""
    default: str | None = None
    init: bool = True
    status: str = ""
    alias: str = ""
    choices: tuple[str, ...] = ()


class Declared(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The declarations of a class; it may have more than were read unless they are ``complete``."""

    complete: bool = True
    fields: dict[str, Field] = {}
    methods: dict[str, dict[str, Field]] = {}
    properties: tuple[str, ...] = ()

    @property
    def arguments(self) -> frozenset[str]:
        """Return the names that the constructor takes."""
        return frozenset(field.alias or name for name, field in self.fields.items() if field.init)

    @property
    def members(self) -> frozenset[str]:
        """Return the names that an object has."""
        return frozenset({*self.fields, *self.methods, *self.properties})


class Table(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The classes of one version; ``commit`` and ``files`` are upstream's, ``origin`` a remark.

    ``nested`` has the names that TensorRT-LLM's own manifest lists below an argument of ``LLM``.
    """

    version: str
    commit: str
    files: tuple[str, ...]
    classes: dict[str, Declared]
    origin: str = ""
    nested: dict[str, tuple[str, ...]] = {}


def versions() -> tuple[str, ...]:
    """Return the versions that have a table, oldest first."""
    return tuple(sorted((path.stem for path in FOLDER.glob("*.json")), key=Version))


@cache
def table(version: str) -> Table:
    """Return the table of one of ``versions()``.

    Raises:
        ValueError: there is none.
    """
    if version not in versions():
        raise ValueError(f"no table of TensorRT-LLM {version}; there are: {', '.join(versions())}")
    return msgspec.json.decode((FOLDER / f"{version}.json").read_bytes(), type=Table)


def nearest(version: str) -> str:
    """Return the version with a table that is nearest to any version.

    It is one of the same minor version, if there is one: the newest that is no newer, else the
    oldest. Without one, the same rule holds among all.
    """
    wanted = Version(version)
    same = [one for one in versions() if Version(one).release[:2] == wanted.release[:2]]
    among = same or versions()
    older = [one for one in among if Version(one) <= wanted]
    return older[-1] if older else among[0]


def anywhere(name: str) -> frozenset[str]:
    """Return the arguments that a class takes in at least one version."""
    return frozenset[str]().union(*(one.arguments for one in _each(name)))


def everywhere(name: str) -> frozenset[str]:
    """Return the arguments that a class takes in each version that was read completely."""
    read = [one.arguments for one in _each(name) if one.complete]
    return frozenset[str].intersection(*read) if read else frozenset()


def _each(name: str) -> Iterator[Declared]:
    for version in versions():
        if name in table(version).classes:
            yield table(version).classes[name]
