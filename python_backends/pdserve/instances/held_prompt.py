"""A prompt that holds a slot of a prefill, until its KV cache has been taken or given up."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.engines.protocol import PrefillJob
from pdserve.instances.acceptance import Acceptance
from pdserve.instances.protocol import Send
from pdserve.rpc.messages import PrefillRequest, Reply
from pdserve.transfer.producer.kv_range import KVRange
from pdserve.transfer.producer.lease_manager import LeasedRange


@dataclass(slots=True, eq=False)
class HeldPrompt:
    """An accepted prompt and its state; changed by its instance only."""

    request: PrefillRequest
    send: Send
    acceptance: Acceptance
    leased: LeasedRange
    kv: KVRange
    job: PrefillJob
    salt: str
    deadline: float
    """Time after which its first token is useless."""
    computing: bool = True
    """True if its first token is not known yet."""
    given_up: Reply | None = None
    """The reply to it, if its first token is not wanted any more."""
