"""Test that docs/configuration.md names every field of a deployment file, and no others."""

from __future__ import annotations

import re

import msgspec

from pdctl.paths import ROOT
from pdserve import config

TEXT = (ROOT / "docs" / "configuration.md").read_text()
SECTIONS = {
    "engine": config.Engine,
    "prefill": config.Prefill,
    "decode": config.Decode,
    "transfer": config.Transfer,
    "gateway": config.Gateway,
    "servers[]": config.Server,
    "control": config.Control,
}
INNER = {
    "transfer.network": config.Network,
    "control.etcd": config.Etcd,
    "control.groups.GROUP": config.GroupBounds,
    "control.tides[]": config.Tide,
    "control.tides[].hours[]": config.Hours,
}
"""Sections within sections."""
ELSEWHERE = {"model", "scenarios"}
"""Fields of the file itself; the fields of scenarios are described in docs/scenarios.md."""


def rows() -> list[list[str]]:
    """Return the cells of each row."""
    start = TEXT.index("| field | default |")
    lines = TEXT[start : TEXT.index("\n\n", start)].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named() -> set[str]:
    """Return ``section.field`` of each first column; ``.field`` belongs to the section before."""
    found, start = set(), TEXT.index("| field | default |")
    for row in re.findall(r"^\| (`.*?) \|", TEXT[start : TEXT.index("\n## ", start)], re.MULTILINE):
        section = ""
        for name in re.findall(r"`([^`]+)`", row):
            if name in (*SECTIONS, *ELSEWHERE, "scenarios[]", "transfer.network"):
                section = name
                continue
            before, _, field = name.rpartition(".")
            section = before or section
            found.add(f"{section}.{field}")
    return found


def fields() -> set[str]:
    sections = {**SECTIONS, **INNER}
    inside = {"transfer.network"}
    return {
        f"{section}.{field}"
        for section, struct in sections.items()
        for field in struct.__struct_fields__
    } - inside


def test_every_field_is_named() -> None:
    assert named() == fields()
    assert set(config.Deployment.__struct_fields__) - ELSEWHERE <= {
        section.removesuffix("[]") for section in SECTIONS
    }


def test_each_row_has_one_field_and_says_what_it_is() -> None:
    heading, _, *below = rows()
    for cells in (heading, *below):
        assert len(cells) == 3
        assert cells[2], cells
    for field, *_ in below:
        assert re.fullmatch(r"`[^`]+`", field), field


def test_defaults_are_those_of_the_code() -> None:
    said = {field.strip("`"): default for field, default, _ in rows()[2:]}
    for section, struct in SECTIONS.items():
        for field in msgspec.structs.fields(struct):
            if isinstance(field.default, bool | int | float | str):
                wanted = msgspec.json.encode(field.default).decode().strip('"')
                assert said[f"{section}.{field.name}"] == wanted.removesuffix(".0"), field.name
