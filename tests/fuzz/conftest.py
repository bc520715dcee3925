"""The server that receives random input, and the amount of input."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from pdserve.config import Prefill
from tests.clients import wait_linked
from tests.fuzz.budget import Budget
from tests.servers import Running, default_deployment, running

LEASE_S = 3.0


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    """Return the budget of each test; see the options in ``tests/conftest.py``."""
    return Budget(
        request.config.getoption("--fuzz-count"), request.config.getoption("--fuzz-seconds")
    )


@pytest.fixture(scope="package")
def fuzzed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two prefills and two decodes of the emulated engine behind one gateway, in one server."""
    deployment = msgspec.structs.replace(
        default_deployment("emulated"), prefill=Prefill(lease_s=LEASE_S)
    )
    with running(deployment, tmp_path_factory.mktemp("fuzz")) as server:
        wait_linked(server)
        yield server
