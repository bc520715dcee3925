"""Fixtures of the tests of the transfer plane."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.unit.transfers import WAYS, Child, Sender, Taker, opened, pick


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A transport's name, one way after the other."""
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
    """A receiver in a process of its own, the same for all tests of one way."""
    key = way, os.environ.get("UCX_TLS", "")
    if key not in _children or _children[key].process.poll() is not None:
        _children[key] = Child(way)
    return _children[key]


@pytest.fixture
def sender() -> Iterator[Sender]:
    """A prefill's end, in this process."""
    sender = Sender()
    yield sender
    sender.close()


@pytest.fixture
def taker(sender: Sender) -> Iterator[Taker]:
    """A decode's end, which is linked to it."""
    taker = Taker()
    taker.connect(sender)
    yield taker
    taker.close()
