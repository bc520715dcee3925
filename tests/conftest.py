"""Fixtures that give tests a real Triton server.

``emulated_server`` and ``torch_server`` are started once per session and shared. A test that
needs another deployment, or breaks its server, starts its own with ``servers.running``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.servers import Running, default_deployment, running

if TYPE_CHECKING:
    from tests.reference import Reference


# A test does not fail because the machine is busy.
hypothesis.settings.register_profile("whenever", deadline=None)
hypothesis.settings.load_profile("whenever")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much random input `tests/fuzz` makes: in `make test` a little, in `make fuzz` all."""
    parser.addoption("--fuzz-count", type=int, default=20_000, help="inputs of each test, at most")
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        default=4.0,
        help="of each test, unless it has made too few inputs until then",
    )


@pytest.fixture(scope="session")
def emulated_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two prefills and two decodes of the emulated engine behind one gateway, in one server."""
    folder = tmp_path_factory.mktemp("emulated")
    with running(default_deployment("emulated"), folder) as server:
        yield server


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two prefills and two decodes of the torch engine behind one gateway, in one server."""
    with running(default_deployment("torch"), tmp_path_factory.mktemp("torch")) as server:
        yield server


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Run the default model with transformers."""
    from tests.reference import Reference

    return Reference(Path(default_deployment("torch").model))
