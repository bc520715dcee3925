"""Fixtures that give tests several hosts, or skip them with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.network import Network, available, hosts


@pytest.fixture(scope="session")
def hosts_possible() -> None:
    reason = available()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def network(hosts_possible: None) -> Iterator[Network]:
    """Make two hosts, ``left`` and ``right``, without a rate limit."""
    with hosts(["left", "right"]) as made:
        yield made
