"""Test that docs/configuration.md names every field of a deployment file, and no others."""

from __future__ import annotations

import re

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
}
ELSEWHERE = {"model", "scenarios"}
"""Fields of the file itself; the fields of scenarios are described in docs/scenarios.md."""


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
    sections = {**SECTIONS, "transfer.network": config.Network}
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
