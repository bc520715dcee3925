"""Tests for making links: the choice of a transport, its measurement, the reason for none."""

from __future__ import annotations

import gc
import logging
import queue
import secrets
import threading
import time
from pathlib import Path
from typing import ClassVar
from unittest import mock

import msgspec
import numpy as np
import pytest

from pdserve.errors import DeploymentError
from pdserve.kvcache.handle import KVHandle, unseal
from pdserve.transfer.consumer.cost_model import Cost
from pdserve.transfer.consumer.peers import NoLink
from pdserve.transfer.consumer.probe import Probe
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Endpoint, host_id
from pdserve.transfer.lease import region as regions
from pdserve.transfer.producer.holder import BUSY_S, IDLE_S, Holder
from pdserve.transfer.protocol import Memory, Spans, Stuck, TransferError, Transport, Unreachable
from pdserve.transfer.reports import LinkReport
from pdserve.transfer.transports.shm import ShmTransport
from tests.unit.memcpy import MemcpyLink, MemcpyTransport
from tests.unit.transfers import KEY, LAYOUT, LIMIT_S, ROWS, Puller, Sender, pick, terms


class Other(MemcpyTransport):
    """A way to memory over another transport."""

    name: ClassVar[str] = "other"


def holder(*transports: Transport, name: str = "prefill_0", region: str = "") -> Holder:
    region = region or f"pdserve-test-{secrets.token_hex(6)}"
    return Holder(name, region, 1 << 20, 4, terms(), transports)


def new_receiver(*transports: Transport, rdma_only: bool = False) -> Receiver:
    pool = np.zeros(LAYOUT.shape(ROWS), np.uint8)
    return Receiver(
        terms(), transports, pool, Staging(np.ones((2, 1 << 16), np.uint8)), rdma_only=rdma_only
    )


def link_report(by: Receiver, of: Holder) -> LinkReport:
    return by.connect(of.endpoint)[1]


# --------------------------------------------------------------------------------------- the holder


def test_an_endpoint_says_what_there_is() -> None:
    made = holder(ShmTransport(), MemcpyTransport())
    described = unseal(made.endpoint, Endpoint, KEY)
    assert (described.name, described.host, described.epoch) == ("prefill_0", host_id(), made.epoch)
    assert (described.fingerprint, described.layout) == ("tiny", LAYOUT)
    assert (described.slots, described.data_bytes) == (4, 1 << 20)
    assert set(described.ways) == {"shm", "memcpy"}
    assert made.endpoint == made.endpoint
    made.close()


def test_every_life_has_an_epoch_of_its_own() -> None:
    lives = [holder(ShmTransport()) for _ in range(3)]
    assert len({one.epoch for one in lives}) == 3
    for one in lives:
        one.close()


def test_a_transport_that_cannot_export_the_memory_is_left_out() -> None:
    class Unable(MemcpyTransport):
        def offer(self, table: Memory, data: Memory) -> bytes:
            raise Unreachable("cudaMallocAsync memory cannot be exported; use cudaMalloc")

    made = holder(Unable(), ShmTransport())
    assert set(unseal(made.endpoint, Endpoint, KEY).ways) == {"shm"}
    made.close()
    region = f"pdserve-test-{secrets.token_hex(6)}"
    with pytest.raises(
        DeploymentError, match=r"no transport; memcpy: cudaMallocAsync .* use cudaM"
    ):
        holder(Unable(), region=region)
    assert not (regions.SHM / region).exists()


def test_transports_that_need_it_are_moved_on_without_a_pause() -> None:
    """They are moved on more often during a lease, since a peer may be waiting."""
    pauses = queue.SimpleQueue[float]()
    moves: list[float] = []

    class Passive(MemcpyTransport):
        def progress(self) -> None:
            moves.append(time.monotonic())

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None:  # a thread that starts is waited for, too
                pauses.put(timeout)
            return super().wait(timeout)

    with mock.patch.object(threading, "Event", Closing):
        made = holder(Passive())

    def next_pauses() -> set[float]:
        return {pauses.get(timeout=LIMIT_S) for _ in range(20)}

    assert next_pauses() == {IDLE_S}
    slot, _ = made.leases.grant(1.0)
    next_pauses()  # a pause that began before may be among them
    assert next_pauses() == {BUSY_S}
    made.leases.free(slot)
    made.close()
    count = len(moves)
    assert count >= 50
    time.sleep(0.05)
    assert len(moves) == count, "it continues after the lease has ended"


def test_shared_memory_needs_no_thread() -> None:
    before = threading.active_count()
    made = holder(ShmTransport())
    assert threading.active_count() == before
    made.close()


# ------------------------------------------------------------------------------------- the receiver


def test_the_best_transport_that_reaches_it_is_taken() -> None:
    made = holder(ShmTransport(), MemcpyTransport(), Other())
    for order, wanted in (
        ([ShmTransport(), Other()], "shm"),
        ([Other(), ShmTransport()], "memcpy"),  # as its links report
    ):
        receiver = new_receiver(*order)
        assert link_report(receiver, made).transport == wanted
        assert link_report(receiver, made).refused == {}
        receiver.close()
    made.close()


def test_why_a_better_one_is_not_taken() -> None:
    class Unfit(MemcpyTransport):
        name: ClassVar[str] = "unfit"

        def register(self, memory: Memory) -> None:
            raise Unreachable(f"{memory.nbytes} bytes cannot be registered")

    class Closed(MemcpyTransport):
        name: ClassVar[str] = "closed"

        def open(self, way: bytes) -> MemcpyLink:
            raise Unreachable("no route to host")

    class Dead(MemcpyTransport):
        name: ClassVar[str] = "dead"

        def open(self, way: bytes) -> MemcpyLink:
            link = super().open(way)
            link.before = lambda number: link.close()
            return link

    made = holder(ShmTransport(), Unfit(), Closed(), Dead())
    dead = Dead()
    receiver = new_receiver(Unfit(), Other(), Closed(), dead, ShmTransport())
    found = link_report(receiver, made)
    assert found.transport == "shm"
    assert found.refused == {
        "unfit": f"{2 << 16} bytes cannot be registered",
        "other": "not offered by the holder",
        "closed": "no route to host",
        "dead": "the link is closed",
    }
    assert [link.closed for link in dead.links] == [True]
    receiver.close()
    nothing = new_receiver(Unfit(), Closed())
    with pytest.raises(
        Unreachable, match=r"prefill_0 cannot be reached; unfit: .* registered; closed: no route"
    ):
        nothing.connect(made.endpoint)
    nothing.close()
    made.close()


def test_a_holder_that_is_known_is_not_connected_again() -> None:
    made, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver = new_receiver(transport)
    first = link_report(receiver, made)
    pulls = len(transport.links[0].pulls)
    assert link_report(receiver, made) is first
    assert len(transport.links) == 1
    assert len(transport.links[0].pulls) == pulls, "nor probed"
    receiver.close()
    assert transport.links[0].closed
    made.close()


def test_a_link_that_has_failed_is_made_again_at_once() -> None:
    """Its cost is known; but that bytes arrive over the new link is verified."""
    made, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver = new_receiver(transport)
    first = link_report(receiver, made)
    peer = receiver.peers.find(made.epoch)
    receiver.peers.leave(peer)
    again = link_report(receiver, made)
    assert (again.bytes_per_s, again.detail) == (first.bytes_per_s, first.detail)
    assert receiver.peers.find(made.epoch).cost_model is peer.cost_model
    former, link = transport.links
    assert (former.closed, link.closed, link.spans) == (True, False, 1)
    # A second pull over the former link may fail long after the first.
    receiver.peers.leave(peer)
    assert receiver.peers.find(made.epoch).link is link
    receiver.close()
    assert link.closed
    made.close()


def test_a_link_over_something_else_or_to_a_new_life_is_measured() -> None:
    made, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver = new_receiver(transport)
    link_report(receiver, made)
    receiver.peers.leave(receiver.peers.find(made.epoch))
    with mock.patch.object(MemcpyLink, "detail", "eth0"):
        assert link_report(receiver, made).detail == "eth0"
        next_life = holder(MemcpyTransport())
        link_report(receiver, next_life)
    assert [link.spans > 1 for link in transport.links] == [True, True, True]
    receiver.close()
    for one in (made, next_life):
        one.close()


def test_a_link_made_again_is_as_fast_as_pulls_over_the_former_were() -> None:
    made, receiver = holder(MemcpyTransport()), new_receiver(MemcpyTransport())
    link_report(receiver, made)
    peer = receiver.peers.find(made.epoch)
    assert peer.cost_model is not None
    peer.cost_model.costs = {"whole": Cost(0.0, 0.0, 1e-6), "direct": Cost(0.0, 0.0, 2e-6)}
    receiver.peers.leave(peer)
    assert link_report(receiver, made).bytes_per_s == pytest.approx(1e6)
    receiver.close()
    made.close()


def test_a_mapped_link_made_again_is_not_measured() -> None:
    made, receiver = holder(ShmTransport()), new_receiver(ShmTransport())
    first = link_report(receiver, made)
    receiver.peers.leave(receiver.peers.find(made.epoch))
    with mock.patch.object(Probe, "mapped", side_effect=AssertionError):
        again = link_report(receiver, made)
    assert (again.detail, again.bytes_per_s) == ("mapped", first.bytes_per_s)
    receiver.close()
    made.close()


def test_what_is_known_of_a_link_outlasts_that_there_is_none() -> None:
    made, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver = new_receiver(transport)
    first = link_report(receiver, made)
    receiver.peers.leave(receiver.peers.find(made.epoch))
    with (
        mock.patch.object(transport, "open", side_effect=Unreachable("no route")),
        pytest.raises(Unreachable),
    ):
        receiver.connect(made.endpoint)
    with pytest.raises(NoLink):
        receiver.peers.find(made.epoch)
    assert link_report(receiver, made).bytes_per_s == first.bytes_per_s
    receiver.close()
    made.close()


def test_a_link_over_which_nothing_comes_is_not_taken_again() -> None:
    made, dead = holder(MemcpyTransport(), ShmTransport()), MemcpyTransport()
    receiver = new_receiver(dead, ShmTransport())
    assert link_report(receiver, made).transport == "memcpy"
    receiver.peers.leave(receiver.peers.find(made.epoch))

    def fail(self: MemcpyLink, spans: Spans, deadline: float) -> None:
        raise TransferError("no bytes")

    with mock.patch.object(MemcpyLink, "pull", fail):
        found = link_report(receiver, made)
    assert (found.transport, found.refused) == ("shm", {"memcpy": "no bytes"})
    receiver.close()
    made.close()


def test_decodes_that_connect_at_once_share_a_link() -> None:
    made, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver = new_receiver(transport)
    threads = [
        threading.Thread(target=link_report, args=(receiver, made), daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(transport.links) == 1
    receiver.close()
    made.close()


def test_a_new_life_takes_the_place_of_the_former() -> None:
    transport = MemcpyTransport()
    receiver, other = new_receiver(transport), holder(MemcpyTransport(), name="prefill_1")
    receiver.connect(other.endpoint)
    lives = []
    for number in range(3):
        lives.append(holder(MemcpyTransport()))
        receiver.connect(lives[-1].endpoint)
        for former in lives[:-1]:
            with pytest.raises(NoLink):
                receiver.peers.find(former.epoch)
        assert receiver.peers.find(lives[-1].epoch).holder.name == "prefill_0"
        assert [link.closed for link in transport.links] == [False, *[True] * number, False]
    receiver.peers.find(other.epoch)
    receiver.close()
    for one in (*lives, other):
        one.close()


def test_a_former_life_whose_link_does_not_end_is_told_once() -> None:
    former, transport = holder(MemcpyTransport()), MemcpyTransport()
    receiver, made = new_receiver(transport), holder(MemcpyTransport())
    receiver.connect(former.endpoint)
    with mock.patch.object(transport.links[0], "close", side_effect=Stuck("cuda:0")):
        with pytest.raises(Stuck):
            receiver.connect(made.endpoint)
        receiver.connect(made.endpoint)
    assert receiver.peers.find(made.epoch).link is transport.links[1]
    receiver.close()
    for one in (former, made):
        one.close()


def test_what_is_measured() -> None:
    made = holder(MemcpyTransport())
    transport = MemcpyTransport()
    receiver = new_receiver(transport)
    found = link_report(receiver, made)
    assert 0 < found.latency_s < 0.1
    assert 1e6 < found.bytes_per_s < 1e12
    assert not found.fallback
    cost_model = receiver.peers.find(made.epoch).cost_model
    assert cost_model is not None
    assert set(cost_model.costs) == {"whole", "direct"}
    assert not receiver.mapped(_any_handle(made))
    receiver.close()
    mapped = new_receiver(ShmTransport())
    shm = holder(ShmTransport())
    assert link_report(mapped, shm).detail == "mapped"
    assert mapped.peers.find(shm.epoch).cost_model is None, "there is only one strategy"
    assert mapped.mapped(_any_handle(shm))
    mapped.close()
    shm.close()
    made.close()


def _any_handle(of: Holder) -> KVHandle:
    return unseal(of.handle(0, 1, 0, bytes(16), 1.0), KVHandle, KEY)


def test_a_slow_link_is_told_as_such() -> None:
    made = holder(MemcpyTransport())

    class Slow(MemcpyTransport):
        def open(self, way: bytes) -> MemcpyLink:
            link = super().open(way)
            link.bytes_per_s = 1e6
            return link

    receiver, began = new_receiver(Slow()), time.monotonic()
    assert link_report(receiver, made).bytes_per_s == pytest.approx(1e6, rel=0.3)
    assert time.monotonic() - began < 2, "the probe ends as soon as the speed is known"
    receiver.close()
    made.close()


@pytest.mark.parametrize("way", ["nixl", "nixl over tcp"])
def test_a_fallback_from_rdma_is_loud(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A log line and a metric (`LinkReport.fallback`) tell of it, or an error if so configured."""
    name, over_tcp = pick(way, monkeypatch), way == "nixl over tcp"
    sender, puller = Sender(name), Puller(name)
    with caplog.at_level(logging.WARNING):
        found = puller.receiver.connect(sender.holder.endpoint)[1]
    assert found.detail.startswith("tcp") == found.fallback == over_tcp
    assert ("without RDMA" in caplog.text) == over_tcp
    strict = Receiver(
        terms(), [type(puller.transport)()], puller.pool, puller.staging, rdma_only=True
    )
    if over_tcp:
        with pytest.raises(
            Unreachable, match=r"nixl: UCX has picked tcp\S*; transfer.require is rdma"
        ):
            strict.connect(sender.holder.endpoint)
    strict.close()
    puller.close()
    sender.close()


def test_connecting_and_leaving_leaks_nothing() -> None:
    def open_files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before, threads = open_files(), threading.active_count()
    for _ in range(3):
        made, receiver = holder(ShmTransport(), MemcpyTransport()), new_receiver(ShmTransport())
        receiver.connect(made.endpoint)
        receiver.close()
        made.close()
        with pytest.raises(NoLink):
            receiver.peers.find(made.epoch)
    del made, receiver
    assert open_files() == before
    assert threading.active_count() == threads


def test_a_holder_whose_data_are_less_than_a_probe() -> None:
    tiny = Holder("prefill_0", f"pdserve-test-{secrets.token_hex(6)}", 300, 1, terms(), [Other()])
    receiver = new_receiver(Other())
    assert link_report(receiver, tiny).bytes_per_s > 0
    receiver.close()
    tiny.close()


def test_a_link_that_fails_while_it_is_probed_raises_no_other_error() -> None:
    class Broken(MemcpyTransport):
        def open(self, way: bytes) -> MemcpyLink:
            link = super().open(way)

            def fail(number: int) -> None:
                if number == 3:
                    raise TransferError("cable cut")

            link.before = fail
            return link

    made, receiver = holder(MemcpyTransport()), new_receiver(Broken())
    with pytest.raises(Unreachable, match="prefill_0 cannot be reached; memcpy: cable cut"):
        receiver.connect(made.endpoint)
    with pytest.raises(NoLink):
        receiver.peers.find(made.epoch)
    receiver.close()
    made.close()


def test_reports_travel_as_messages() -> None:
    made = LinkReport(
        "nixl", "rc_mlx5/mlx5_0:1", 3e-6, 2e10, {"shm": "another host"}, fallback=False
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=LinkReport) == made


def test_mapped_memory_is_measured_once() -> None:
    """A decode that has just got its role links to many prefills at once."""
    holders = [holder(ShmTransport(), name=f"prefill_{number}") for number in range(3)]
    receiver = new_receiver(ShmTransport())
    with mock.patch.object(Probe, "mapped", return_value=4e9) as measured:
        assert {link_report(receiver, one).bytes_per_s for one in holders} == {4e9}
        assert measured.call_count == 1
        receiver.close()
        # The next receiver of the process may know it, too.
        rates = receiver.peers._rates
        pool, staging = (np.zeros(shape, np.uint8) for shape in (LAYOUT.shape(ROWS), (2, 4096)))
        receiver = Receiver(terms(), [ShmTransport()], pool, Staging(staging), rates=rates)
        assert link_report(receiver, holders[0]).bytes_per_s == 4e9
        assert measured.call_count == 1
    receiver.close()
    for one in holders:
        one.close()
