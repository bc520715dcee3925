"""A request that a decode has accepted, until its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pdserve.engines.protocol import DecodeSequence
from pdserve.instances.slot_watches import Send
from pdserve.kvcache.block_manager import ReservedBlocks
from pdserve.rpc.messages import DecodeRequest, Reply
from pdserve.transfer.reports import TransferReport


@dataclass(slots=True, eq=False)
class AcceptedCall:
    """Changed by its instance only."""

    request: DecodeRequest
    send: Send
    reserved: ReservedBlocks
    sequence: DecodeSequence
    arrived: bool = False
    """The prompt's K and V are in its blocks."""
    stuck: bool = False
    """Something may still be written to its blocks: they are given to nobody."""
    unsent: list[int] = field(default_factory=list)
    sent_at: float = 0.0
    transfer: TransferReport | None = None
    """How the KV cache came, until it has been told."""
    released: bool = False
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Tells the acceptance, unless something else is told before."""

    @property
    def on_trial(self) -> bool:
        """It may end this instance, and has had no token here yet."""
        return self.request.suspect and (not self.arrived or self.transfer is not None)

    @property
    def local(self) -> bool:
        """The decode computes the prompt itself."""
        return not self.request.handle

    def tell(self, reply: Reply, last: bool) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.send(reply, last)
