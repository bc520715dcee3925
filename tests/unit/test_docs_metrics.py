"""Tests that docs/metrics.md lists every declared metric, and that no document names others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pdctl.paths import ROOT
from pdserve.observability.catalogue import METRICS
from tests.unit.inprocess import SERIES

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_metric_is_listed() -> None:
    declared = [
        f"| `{metric.name}` | {type(metric).__name__.lower()} "
        f"| {', '.join(metric.label_names) or 'none'} | {metric.unit} | {metric.help_text} |"
        for metric in METRICS.values()
    ]
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert re.findall(r"^\| `.*$", text, re.MULTILINE) == declared


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_name_is_one_of_a_metric(document: Path) -> None:
    named = set(re.findall(r"pdserve_\w+", document.read_text()))
    assert named <= SERIES | METRICS.keys()
