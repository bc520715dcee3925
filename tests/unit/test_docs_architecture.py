"""Test that the map in docs/architecture.md names every module, and no others."""

from __future__ import annotations

import re

from pdctl.paths import ROOT

PACKAGE = ROOT / "python_backends" / "pdserve"
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def named() -> set[str]:
    """Return the modules it names, and the folders with a slash at their end."""
    start = TEXT.index("## Map of `python_backends/pdserve`")
    rows = re.findall(r"^\| (`.*?) \|", TEXT[start : TEXT.index("\n## ", start + 1)], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_map_matches_the_tree() -> None:
    names = named()
    folders = {name for name in names if name.endswith("/")}
    modules = {
        str(file.relative_to(PACKAGE).with_suffix(""))
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }
    assert all((PACKAGE / folder).is_dir() for folder in folders)
    assert names - folders <= modules
    covered = {module for module in modules if module.startswith(tuple(folders))}
    assert modules - covered == names - folders
