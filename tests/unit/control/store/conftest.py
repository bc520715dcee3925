"""Fixtures of the tests of the store: a real etcd for all of them, or one that may be broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.control.store.etcd_server import MISSING, EtcdServer


def _running(folder: Path) -> Iterator[EtcdServer]:
    if MISSING:
        pytest.skip(MISSING)
    server = EtcdServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Run an etcd that no test disturbs."""
    yield from _running(tmp_path_factory.mktemp("etcd"))


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """Run an etcd for this test alone, which may stop or kill it."""
    yield from _running(tmp_path)
