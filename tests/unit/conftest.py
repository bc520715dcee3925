"""Fixtures of the tests of the transfer plane."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.unit.transfers import WAYS, Child, Puller, Sender, opened, pick


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a transport's name, one way after another."""
    return pick(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    for one in list(opened):
        one.close()


@pytest.fixture(scope="session")
def _children() -> Iterator[dict[tuple[str, str], Child]]:
    children: dict[tuple[str, str], Child] = {}
    yield children
    for child in children.values():
        child.kill()


@pytest.fixture
def child(way: str, _children: dict[tuple[str, str], Child]) -> Child:
    """Start a receiver in a separate process, shared by all tests of one way."""
    key = way, os.environ.get("UCX_TLS", "")
    if key not in _children or _children[key].process.poll() is not None:
        _children[key] = Child(way)
    return _children[key]


@pytest.fixture
def sender() -> Iterator[Sender]:
    """Make the prefill's end of transfers, in this process."""
    sender = Sender()
    yield sender
    sender.close()


@pytest.fixture
def puller(sender: Sender) -> Iterator[Puller]:
    """Make the decode's end of transfers, linked to the prefill's end."""
    puller = Puller()
    puller.connect(sender)
    yield puller
    puller.close()
