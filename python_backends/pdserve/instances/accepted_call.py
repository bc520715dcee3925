"""A request that a decode has accepted, until its end."""

from __future__ import annotations

import asyncio
from dataclasses import KW_ONLY, dataclass, field

from pdserve.engines.protocol import DecodeSequence
from pdserve.instances.protocol import Send
from pdserve.kvcache.block_manager import ReservedBlocks
from pdserve.rpc.messages import DecodeRequest, Reply
from pdserve.transfer.reports import TransferReport


@dataclass(slots=True, eq=False)
class AcceptedCall:
    """An accepted request and its state; changed by its instance only."""

    request: DecodeRequest
    send: Send
    _: KW_ONLY
    arrived_at: float | None = None
    """Time (``loop.time()``) since which the prompt's K and V are in this decode."""
    unsent: list[int] = field(default_factory=list)
    sent_at: float = 0.0
    transfer: TransferReport | None = None
    """Report of the KV cache's transfer, until it has been sent."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Timer of the acceptance, unless another reply is sent before."""

    @property
    def arrived(self) -> bool:
        return self.arrived_at is not None

    @property
    def on_trial(self) -> bool:
        """Tell whether it is a suspect that has had no token here yet."""
        return self.request.suspect and (not self.arrived or self.transfer is not None)

    def tell(self, reply: Reply, last: bool) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.send(reply, last)


@dataclass(slots=True, eq=False)
class ReservedCall(AcceptedCall):
    """An accepted request with blocks of the decode's own pool."""

    reserved: ReservedBlocks
    sequence: DecodeSequence
    _: KW_ONLY
    stuck: bool = False
    """True if something may still be written to its blocks, which are not reused then."""
    given_up: Reply | None = None
    """The last reply to it, if it is not wanted any more."""

    @property
    def local(self) -> bool:
        """Tell whether the decode computes the prompt itself."""
        return not self.request.handle
