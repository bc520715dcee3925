"""Tests for reading YAML files that people write by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pdctl.paths import ROOT
from pdserve import config
from pdserve.config import documents
from pdserve.errors import DeploymentError


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_bytes((ROOT / "deployment.yaml").read_bytes() + b"\nmodel: another\n")
    with pytest.raises(DeploymentError, match=r"deployment.yaml: key 'model' stands twice, in l"):
        config.load(file)


def test_a_key_that_stands_twice_in_a_nested_mapping() -> None:
    with pytest.raises(msgspec.DecodeError, match=r"'b' stands twice, in lines 2 and 4"):
        documents.decode(b"a:\n- b: 1\n  c: 2\n  b: 1\n", dict)


def test_the_same_key_in_two_mappings_is_allowed() -> None:
    twice = b"- &first {b: 1, c: 2}\n- {<<: *first, b: 3}\n"
    assert documents.decode(twice, list[dict[str, int]]) == [{"b": 1, "c": 2}, {"b": 3, "c": 2}]


@pytest.mark.parametrize("text", [b"a: [1", b"a: !!python/name:os.system", b"? [1]\n: 2\n"])
def test_what_is_not_plain_yaml(text: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        documents.decode(text, dict)
