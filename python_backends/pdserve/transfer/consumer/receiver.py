"""A decode's end of the transfer plane: links to holders, and pulls over them.

    connect  open a link to a holder over the best transport that reaches it, probe, warm
    open     check a handle
    pull     look at the lease, say PULLING, move the bytes, look again, say DONE

Neither side waits for the other. If a holder revokes a lease during a pull, the last look shows it,
and what was copied is discarded; a receiver that dies during a pull stays PULLING, and the holder
waits only for its own bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from pdserve.errors import HandleError
from pdserve.kvcache.handle import KVHandle, unseal
from pdserve.kvcache.sharding import routes
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.clock import Clock
from pdserve.transfer.consumer import strategies
from pdserve.transfer.consumer.cost_model import Seen, Strategy
from pdserve.transfer.consumer.peers import NoLink, Peer, Peers
from pdserve.transfer.consumer.probe import Probe
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.consumer.strategies import Move, Part
from pdserve.transfer.endpoint import Endpoint, Terms, host_id
from pdserve.transfer.lease.remote import RemoteLease
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.protocol import Link, TransferError, Transport
from pdserve.transfer.reports import LinkReport, TransferReport
from pdserve.transfer.scatter import Runs, checked


class Receiver:
    """Pulls KV caches of one model into one pool. Thread-safe.

    Args:
        transports: the best first.
        pool: uint8 [planes, rows, row_bytes].
        ranks: tensor parallelism of this side; all of its ranks are in this process.
        rdma_only: refuse a network link that is not RDMA.
        strategy: None: the cost model chooses.
        timeout_s: seconds of one pull, the wait for planes that are still being computed included.
        clock: by which leases end, and threads wait.
        probe: measures new links; None: as `Probe` does by itself.
    """

    def __init__(
        self,
        terms: Terms,
        transports: Sequence[Transport],
        pool: Array,
        staging: Staging,
        *,
        ranks: int = 1,
        rdma_only: bool = False,
        strategy: Strategy | None = None,
        timeout_s: float = 30.0,
        clock: Clock = time,
        probe: Probe | None = None,
    ) -> None:
        self._terms = terms
        self._pool = pool
        self._staging = staging
        self.strategy = strategy
        self._timeout_s = timeout_s
        self._clock = clock
        self.peers = Peers(
            terms, transports, pool, staging, probe or Probe(staging, clock), rdma_only, clock
        )
        layout, sharding = terms.layout, terms.sharding
        self._row_bytes = sharding.row_bytes(layout)
        """Bytes of a row of one part."""
        head_bytes = layout.row_bytes // layout.kv_heads
        # If there are more ranks than heads, several ranks need the same head; here all ranks are
        # together.
        wanted = {
            route.first_head: route.part
            for rank in range(ranks)
            for route in routes(sharding, ranks, layout.kv_heads, rank)
        }
        self._wanted = [(part, head * head_bytes) for head, part in wanted.items()]
        """The parts that are pulled, and the offset of their bytes in a row of the pool."""

    def connect(self, data: bytes) -> tuple[str, LinkReport]:
        """Connect to a holder; see `Peers.connect`."""
        return self.peers.connect(data)

    def unlink(self, epoch: bytes, number: int, within_s: float) -> None:
        """Close the link to a holder; see `Peers.unlink`."""
        self.peers.unlink(epoch, number, within_s)

    def linked(self, name: str) -> bool:
        """Tell whether there is a link to a holder of this name."""
        return self.peers.linked(name)

    def open(self, data: bytes) -> KVHandle:
        """Check a handle by itself, and return it.

        Raises:
            HandleError: it is forged, altered, expired, of another model, of a former assignment
                of its holder, or beyond its holder's memory.
            NoLink: there is no link to its holder under this assignment yet.
        """
        handle = unseal(data, KVHandle, self._terms.key)
        handle.check(self._terms.fingerprint, self._terms.layout, self._terms.sharding)
        end = handle.offset + handle.nbytes
        peer = self.peers.find(handle.epoch)
        _check_number(handle, peer.holder)
        if handle.lease >= peer.holder.slots:
            raise HandleError(
                f"KV handle names lease slot {handle.lease}; "
                f"{peer.holder.name} has {peer.holder.slots}"
            )
        if end > peer.holder.data_bytes:
            raise HandleError(
                f"KV handle ends at byte {end}; {peer.holder.name} has {peer.holder.data_bytes}"
            )
        self._check_time(peer, handle.expires, "KV handle")
        return handle

    def _check_time(self, peer: Peer, expires: float, what: str) -> None:
        # On another host, with another clock, only the lease table tells.
        if peer.holder.host == host_id():
            now = self._clock.monotonic()
            # Written so that a NaN counts as expired.
            if not now < expires:
                raise HandleError(f"{what} expired {now - expires:.3f} s ago")

    def mapped(self, handle: KVHandle) -> bool:
        """Tell whether a pull would be a copy only."""
        try:
            return self.peers.find(handle.epoch).link.data is not None
        except NoLink:
            return False

    def pull(self, handle: KVHandle, runs: Runs, first: int = 0) -> TransferReport:
        """Copy a KV cache from token `first` on into `runs` of the pool.

        The copy is layered if the KV cache is still being computed. The handle must be one that
        `open` has returned; it is valid for one pull, however that ends.

        Raises:
            HandleError: the lease has ended or was used; what was copied is not valid.
            TransferError: the bytes could not be moved; the link is closed.
            NoLink: the link has failed since `open`.
            ValueError: the runs do not have as many rows as there are tokens, or are not in the
                pool.
        """
        with self.peers.pulling(handle.epoch) as peer:
            return self._pull(peer, handle, runs, first)

    def _pull(self, peer: Peer, handle: KVHandle, runs: Runs, first: int) -> TransferReport:
        began = self._clock.monotonic()
        lease = RemoteLease(peer.link, handle, self._terms.layout.planes, self._clock)
        try:
            lease.look()
            if lease.said is not Pull.IDLE:
                raise HandleError(f"KV handle was used before: lease {handle.lease}")
            self._check_time(peer, lease.grant.expires, f"lease {handle.lease}")
            lease.say(Pull.PULLING)
            try:
                move = self._move(
                    peer.link, handle, runs, first, began + self._timeout_s, lease.alive
                )
                strategy, expected_s = self._follow(peer, move, lease)
                # Before DONE is said: from then on the holder may end the lease.
                lease.look()
            except BaseException:
                with suppress(TransferError):  # the first error is reported, not this one
                    lease.say(Pull.DONE)
                raise
            lease.say(Pull.DONE)
        except TransferError:
            self.peers.leave(peer)
            raise
        ended = self._clock.monotonic()
        return TransferReport(
            nbytes=move.nbytes,
            transport=peer.link.transport,
            strategy=strategy,
            ms=(ended - began) * 1e3,
            exposed_ms=(ended - max(began, lease.unfilled_at)) * 1e3,
            expected_ms=expected_s * 1e3,
            token=lease.grant.token,
        )

    def _move(
        self,
        link: Link,
        handle: KVHandle,
        runs: Runs,
        first: int,
        deadline: float,
        alive: Callable[[], None],
    ) -> Move:
        # For every strategy: no row of another request is written, and none of this one left out.
        runs = checked(runs, handle.tokens - first, self._pool.shape[1])
        planes = self._terms.layout.planes
        part_bytes = planes * handle.tokens * self._row_bytes
        parts = tuple(
            Part(handle.offset + part * part_bytes, self._row_bytes, column)
            for part, column in self._wanted
        )
        return Move(
            link=link,
            parts=parts,
            length=handle.tokens,
            tokens=range(first, handle.tokens),
            planes=range(planes),
            pool=self._pool,
            runs=runs,
            deadline=deadline,
            alive=alive,
        )

    def _follow(self, peer: Peer, move: Move, lease: RemoteLease) -> tuple[str, float]:
        """Move every plane as it becomes ready.

        Return the strategy, and the last move's expected seconds.
        """
        layered, done, chosen, expected_s = not lease.filled, 0, "whole", 0.0
        while not lease.filled or done < lease.planes:
            ready = min(lease.grant.filled, lease.planes)
            if ready > done:
                chosen, expected_s = self._choose_and_move(peer, move.of(range(done, ready)))
                done = ready
            elif self._clock.monotonic() > move.deadline:
                raise HandleError(f"only {done} of {lease.planes} planes were computed in time")
            else:
                lease.wait()
        return "layered" if layered else chosen, expected_s

    def _choose_and_move(self, peer: Peer, move: Move) -> tuple[str, float]:
        if peer.cost_model is None:
            strategies.mapped(move)
            return "whole", move.nbytes / peer.report.bytes_per_s
        choice = peer.cost_model.choose(move.segments, move.nbytes, self._staging.free)
        strategy = self.strategy or choice.strategy
        began = self._clock.perf_counter()
        if strategy == "whole":
            strategies.whole(move, self._staging)
        else:
            strategies.direct(move)
        seen = Seen(move.segments, move.nbytes, self._clock.perf_counter() - began)
        expected_s = peer.cost_model.costs[strategy].seconds(move.segments, move.nbytes)
        peer.cost_model.saw(strategy, seen)
        return strategy, expected_s

    def close(self) -> None:
        """Close the links to all holders, and let go of the pool and the staging buffers."""
        self.peers.close()
        self._pool = arrays.like(self._pool, (0, 0, 0))
        self._staging.close()


def _check_number(handle: KVHandle, holder: Endpoint) -> None:
    """Raises NoLink: the link is to a former assignment; HandleError: the handle is of one."""
    if handle.number > holder.number:
        raise NoLink(f"there is no link to assignment {handle.number} of {holder.name} yet")
    if handle.number < holder.number:
        raise HandleError(
            f"KV handle is of assignment {handle.number} of {holder.name}, "
            f"which has {holder.number} now"
        )
