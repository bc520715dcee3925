"""Tests for the transfer plane between hosts, and for pulls while the network is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.hosts.ends import NBYTES, End
from tests.hosts.network import Network, hosts

pytestmark = [pytest.mark.hosts, pytest.mark.alone]

RATE_MBIT = 500
PULL_S = NBYTES * 8e-6 / RATE_MBIT
"""Minimum seconds to pull one KV cache: 1.07 s."""
LIMIT_S = 10.0
"""Seconds within which an undisturbed pull ends."""


@pytest.fixture
def network(hosts_possible: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    for variable in ("UCX_TLS", "UCX_NET_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    with hosts(["left", "right"], RATE_MBIT) as made:
        yield made


@pytest.fixture
def sender(network: Network) -> Iterator[End]:
    end = End(network, "left", "sender")
    yield end
    end.end()


@pytest.fixture
def puller(network: Network) -> Iterator[End]:
    end = End(network, "right", "puller")
    yield end
    end.end()


def begin(sender: End, puller: End) -> str:
    """Connect and begin to pull; return the digest that must arrive."""
    assert puller.say("connect", sender.say("describe")) == "tcp/eth0"
    sealed, digest = sender.say("offer").split()
    puller.write("pull", sealed)
    return digest


def wait_nothing_held(sender: End, within: float) -> None:
    deadline = time.monotonic() + within
    while (held := sender.say("held")) != "{}":
        assert time.monotonic() < deadline, f"still held: {held}"
        time.sleep(0.05)


def test_no_option_is_needed(sender: End, puller: End) -> None:
    digest = begin(sender, puller)
    assert puller.read(LIMIT_S) == digest
    wait_nothing_held(sender, within=2.0)


def test_a_short_cut_only_takes_time(network: Network, sender: End, puller: End) -> None:
    digest = begin(sender, puller)
    time.sleep(PULL_S / 4)
    network.cut("left")
    time.sleep(0.3)
    network.restore("left")
    assert puller.read(LIMIT_S) == digest
    wait_nothing_held(sender, within=2.0)


def test_a_long_cut_ends_the_pull_on_both_sides(network: Network, sender: End, puller: End) -> None:
    begin(sender, puller)
    time.sleep(PULL_S / 4)
    network.cut("left")
    assert puller.read(within=5.0).startswith("TransferError: ")
    wait_nothing_held(sender, within=QUIET_S + 2.0)
    network.restore("left")
    digest = begin(sender, puller)
    assert puller.read(LIMIT_S) == digest


def test_a_host_that_does_not_answer_is_not_waited_for(
    network: Network, sender: End, puller: End
) -> None:
    digest = begin(sender, puller)
    assert puller.read(LIMIT_S) == digest
    endpoint = sender.say("describe")
    other = End(network, "right", "puller")
    try:
        network.cut("left")
        assert other.say("connect", endpoint, within=LIMIT_S).startswith("Unreachable: ")
    finally:
        other.end()
