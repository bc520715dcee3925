"""The holders that a receiver is linked to, and how each is reached."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pdserve.errors import HandleError, PDServeError
from pdserve.kvcache.handle import unseal
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.clock import Clock
from pdserve.transfer.consumer.cost_model import CostModel
from pdserve.transfer.consumer.probe import LARGE, Probe
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Endpoint, Terms
from pdserve.transfer.protocol import Link, TransferError, Transport, Unreachable
from pdserve.transfer.reports import LinkReport

_log = logging.getLogger(__name__)

# The transport that UCX falls back to where it finds no RDMA device, or may not use it. Within one
# host it copies (cma) instead.
WITHOUT_RDMA = "tcp"
UNLINKED_S = 30.0
"""Seconds after `unlink` for which that holder is not connected again: a connect that was sent
before may come after it, and would keep the memory that is being given back."""
_LOOK_S = 0.005


class NoLink(PDServeError):
    """There is no link to the holder of a KV cache, or it has failed: connect first."""


@dataclass(slots=True)
class Peer:
    """A holder with the link to it."""

    holder: Endpoint
    link: Link
    report: LinkReport
    cost_model: CostModel | None
    """None: its memory is mapped, so there is nothing to choose."""
    failed: bool = False
    """True if the link has failed; its report is kept."""
    pulls: int = 0
    """Number of pulls in progress."""

    def over_the_same(self, link: Link) -> bool:
        """Tell whether a link has this peer's transport, and so the same measurements."""
        return (self.report.transport, self.report.detail) == (link.transport, link.detail)


class Peers:
    """The holders that this receiver is linked to, by epoch. Thread-safe.

    Args:
        transports: the best first; one that cannot use the memory is left out, with the reason.
        pool: memory that pulls arrive in, besides the staging buffers.
        probe: measures new links, by the staging buffers.
        rdma_only: refuse a network link that is not RDMA.
        clock: by which `unlink` waits.
    """

    def __init__(
        self,
        terms: Terms,
        transports: Sequence[Transport],
        pool: Array,
        staging: Staging,
        probe: Probe,
        rdma_only: bool,
        clock: Clock = time,
    ) -> None:
        self._terms = terms
        self._probe = probe
        self._rdma_only = rdma_only
        self._clock = clock
        self._peers: dict[bytes, Peer] = {}
        self._unlinked: dict[bytes, tuple[int, float]] = {}
        """For each holder that was unlinked, up to which assignment, and until when it is not
        connected again."""
        self._connecting = threading.Lock()
        self._changing = threading.Lock()
        """Held for moments, while peers come and go or a pull begins or ends."""
        self._transports: list[Transport] = []
        self._unfit: dict[str, str] = {}
        for transport in transports:
            try:
                transport.register(arrays.memory(staging.memory))
                transport.register(arrays.memory(pool))
            except Unreachable as error:
                self._unfit[transport.name] = str(error)
            else:
                self._transports.append(transport)

    def connect(self, data: bytes) -> tuple[str, LinkReport]:
        """Connect to a holder by its sealed `Endpoint`; return its name, and how it is reached.

        Blocks for some seconds at most; for a known holder, not at all, and for one whose link has
        failed only until there is a new one, since a request may be waiting for that.

        Raises:
            HandleError: the endpoint is forged, belongs to another model, or to a former
                assignment.
            Unreachable: no transport reaches it, or it was unlinked; the message has every reason.
        """
        holder = unseal(data, Endpoint, self._terms.key)
        terms = self._terms
        if (holder.fingerprint, holder.layout) != (terms.fingerprint, terms.layout):
            raise HandleError(
                f"{holder.name} has model {holder.fingerprint!r} in {holder.layout}; "
                f"this instance {terms.fingerprint!r} in {terms.layout}"
            )
        with self._connecting:
            self._check_unlinked(holder)
            peer = self._peers.get(holder.epoch)
            if peer is None or peer.failed:
                former = [p for p in self._peers.values() if p.holder.name == holder.name]
                for one in former:
                    if not one.failed:
                        self.leave(one)
                peer = self._connected(holder, peer)
                with self._changing:
                    for one in former:
                        self._peers.pop(one.holder.epoch, None)
                    self._peers[holder.epoch] = peer
                try:
                    self._check_unlinked(holder)  # which may have come meanwhile
                except Unreachable:
                    self._peers.pop(holder.epoch, None)
                    self.leave(peer)
                    raise
            elif holder.number < peer.holder.number:
                raise HandleError(
                    f"{holder.name} has assignment {peer.holder.number}, "
                    f"not {holder.number} any more"
                )
            peer.holder = holder  # the same memory, perhaps under another assignment
        return holder.name, peer.report

    def _check_unlinked(self, holder: Endpoint) -> None:
        number, until = self._unlinked.get(holder.epoch, (0, 0.0))
        if holder.number <= number and (left := until - self._clock.monotonic()) > 0:
            raise Unreachable(
                f"{holder.name} was unlinked, since it gives its memory back; it is not connected "
                f"again for {left:.0f} s"
            )

    def _connected(self, holder: Endpoint, former: Peer | None) -> Peer:
        refused = dict(self._unfit)
        for transport in self._transports:
            way = holder.ways.get(transport.name)
            if way is None:
                refused[transport.name] = "not offered by the holder"
                continue
            try:
                peer = self._probed(holder, transport.open(way), refused, former)
            except (Unreachable, TransferError) as error:
                refused[transport.name] = str(error)
            else:
                for name, why in refused.items():
                    _log.warning("%s is not reached over %s: %s", holder.name, name, why)
                return peer
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise Unreachable(f"{holder.name} cannot be reached; {reasons}")

    def _probed(
        self, holder: Endpoint, link: Link, refused: dict[str, str], former: Peer | None
    ) -> Peer:
        try:
            # A link that does not report its transport is not trusted to have RDMA.
            fallback = link.transport == "nixl" and (
                not link.detail or link.detail.startswith(WITHOUT_RDMA)
            )
            if fallback:
                if self._rdma_only:
                    raise Unreachable(f"UCX has picked {link.detail}; transfer.require is rdma")
                _log.warning("%s is reached over %s, without RDMA", holder.name, link.detail)
            latency = self._probe.latency(link)
            like = former if former is not None and former.over_the_same(link) else None
            rate, cost_model = self._rate(holder, link, like)
        except BaseException:
            link.close()
            raise
        report = LinkReport(link.transport, link.detail, latency, rate, dict(refused), fallback)
        return Peer(holder, link, report, cost_model)

    def _rate(
        self, holder: Endpoint, link: Link, like: Peer | None
    ) -> tuple[float, CostModel | None]:
        """Return bytes per second, and a cost model.

        Measured only if there is no peer `like` this one.
        """
        if link.data is not None:
            if like is not None:
                return like.report.bytes_per_s, None
            return self._probe.mapped(link, holder.data_bytes), None
        if like is not None and like.cost_model is not None:
            self._probe.once(link, holder.data_bytes)
            cost_model = like.cost_model
        else:
            cost_model = CostModel(self._probe.moves(link, holder.data_bytes))
        return LARGE / min(c.seconds(1, LARGE) for c in cost_model.costs.values()), cost_model

    def find(self, epoch: bytes) -> Peer:
        """Return the peer of an epoch. Raises NoLink if there is none, or its link has failed."""
        peer = self._peers.get(epoch)
        if peer is None or peer.failed:
            raise NoLink(f"there is no link to holder {epoch.hex()}, or it has failed")
        return peer

    def linked(self, name: str) -> bool:
        """Tell whether there is a link to a holder of this name."""
        return any(peer.holder.name == name for peer in list(self._peers.values()))

    @contextmanager
    def pulling(self, epoch: bytes) -> Iterator[Peer]:
        """Give the peer of an epoch for a pull, for which `unlink` waits.

        Raises:
            NoLink: see `find`.
        """
        with self._changing:
            peer = self.find(epoch)
            peer.pulls += 1
        try:
            yield peer
        finally:
            with self._changing:
                peer.pulls -= 1

    def unlink(self, epoch: bytes, number: int, within_s: float) -> None:
        """Close the link to a holder and forget it; it is no error if there is none.

        No pull over it begins any more. Those in progress may end; what is left after ``within_s``
        seconds fails by the end of the link, at the latest when it looks at its lease again.

        Args:
            number: the link stays if it is to a later assignment of the holder.

        Raises:
            Stuck: a device does not end a copy; see `Link.close`.
        """
        began = self._clock.monotonic()
        with self._changing:
            known = {key: entry for key, entry in self._unlinked.items() if entry[1] > began}
            self._unlinked = {**known, epoch: (number, began + UNLINKED_S)}
            peer = self._peers.get(epoch)
            if peer is None or peer.holder.number > number:
                return
            del self._peers[epoch]
            peer.failed = True
        while peer.pulls and self._clock.monotonic() < began + within_s:
            self._clock.sleep(_LOOK_S)
        peer.link.close()

    def leave(self, peer: Peer) -> None:
        """Close a link that has failed; a new one may be made."""
        peer.failed = True
        peer.link.close()

    def close(self) -> None:
        """Close the links to all holders."""
        with self._connecting:
            for peer in list(self._peers.values()):
                self.leave(peer)
        for transport in self._transports:
            transport.close()
