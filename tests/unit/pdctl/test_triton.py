"""Tests for the search for a Triton server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdctl import triton
from pdctl.errors import ServerError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a host where neither PATH nor the environment has a server, as in a login shell."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(triton, "BACKENDS", tmp_path / "none")
    monkeypatch.setattr(triton, "IMAGE", tmp_path / "tritonserver" / "bin")
    monkeypatch.setattr(triton, "IMAGE_PYTHON", tmp_path / "venv" / "bin")
    return tmp_path


def test_nothing_is_set_up(bare: Path) -> None:
    with pytest.raises(ServerError, match="run `make setup`"):
        triton.locate()


@pytest.mark.parametrize("venv", [False, True], ids=["until 26.03", "since 26.04"])
def test_a_login_shell_of_an_image_is_told_its_path(bare: Path, venv: bool) -> None:
    """It has Triton, and a `make setup` would be of no use there."""
    triton.IMAGE.mkdir(parents=True)
    (triton.IMAGE / "tritonserver").touch()
    if venv:
        triton.IMAGE_PYTHON.mkdir(parents=True)
    with pytest.raises(ServerError) as told:
        triton.locate()
    python = f":{bare}/venv/bin" * venv
    assert str(told.value) == (
        f"no tritonserver on PATH: run `export PATH={bare}/tritonserver/bin{python}:$PATH`"
    )
