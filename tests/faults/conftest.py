"""Two deployments that tests may break and share: each test waits for the repair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.serving import all_in_one, gateway_and_workers, watched, whole
from tests.servers import Running


@pytest.fixture(scope="package")
def _one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("one_server")
    with watched(all_in_one(folder), folder) as started:
        yield started


@pytest.fixture(scope="package")
def _workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("workers")
    with watched(gateway_and_workers(all_in_one(folder), gateways=2), folder) as started:
        yield started


@pytest.fixture
def one_server(_one_server: Running) -> Iterator[Running]:
    """One server with all instances and the gateway."""
    with whole(_one_server):
        yield _one_server


@pytest.fixture
def workers(_workers: Running) -> Iterator[Running]:
    """Two gateways, and one server for each instance."""
    with whole(_workers):
        yield _workers
