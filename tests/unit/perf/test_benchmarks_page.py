"""Tests that docs/benchmarks.md and the figures of README.md are those of perf/results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
import typer
from perf.benchmarks_page import __main__ as command
from perf.benchmarks_page import result as results
from perf.record import RESULTS

if TYPE_CHECKING:
    from pathlib import Path

PASSING = ("-quick", "-part")
"""Ends of the names of result files that git ignores."""


def test_the_files_are_up_to_date() -> None:
    command.main(check=True)


def test_every_file_of_results_is_on_the_page() -> None:
    page = command.PAGE.read_text()
    kept = [file for file in RESULTS.glob("*.json") if not file.stem.endswith(PASSING)]
    assert kept
    assert all(f"(../perf/results/{file.name})" in page for file in kept)


def test_every_table_has_its_place() -> None:
    template = command.TEMPLATE.read_text()
    assert all(f"{{{{{name}}}}}" in template for name in command.TABLES)
    with pytest.raises(KeyError, match="no such table"):
        command.page("{{no such table}}")


def test_a_number_that_changes_makes_both_files_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = msgspec.json.decode((tmp_path / "overhead.json").read_bytes())
    document["results"]["budgets"][0]["measured"] = 3.33
    (tmp_path / "overhead.json").write_bytes(msgspec.json.encode(document))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(typer.Exit) as ended:
        command.main(check=True)
    assert ended.value.exit_code == 1
    said = capsys.readouterr().err
    for name in ("docs/benchmarks.md", "README.md"):
        assert f"{name} is not what perf/results say" in said
    assert "`python -m perf.benchmarks_page` writes it" in said


def test_a_readme_without_a_place_for_the_figures() -> None:
    with pytest.raises(ValueError, match=r"README\.md has no"):
        command.with_figures("# P/D-Serve\n")
