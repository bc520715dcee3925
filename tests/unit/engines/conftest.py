"""The versions of the fake of TensorRT-LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.engines.llm import VERSIONS, installed

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make ``import tensorrt_llm`` find the fake, in each version."""
    with installed(request.param):
        yield request.param
