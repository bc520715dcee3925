"""How a gateway is told that its request has been accepted and is worked on, and how often."""

from __future__ import annotations

import asyncio

from pdserve import config
from pdserve.instances.slot_watches import Send
from pdserve.rpc.messages import Accepted, DecodeRequest

# A result that comes sooner than this speaks for itself; else the acceptance is told first,
# and told again while the computation lasts: silence would be a stall.
AFTER_S = 0.005
AGAIN_S = 5.0
# A suspect is begun so long after its acceptance, which has been told by then, whatever it does.
TRIAL_S = 0.02


def interval_s(limits: config.Decode, streams: int, request: DecodeRequest) -> float:
    """Seconds between two responses of a request: what those of all together cost, bounded.

    A decode's own open ``streams`` times the request's ``peers`` stand for what its gateway has
    open, since a gateway spreads its requests evenly. A request may also ask for longer.
    """
    cost_ms = min(limits.response_cost_ms * streams * request.peers, limits.max_interval_ms)
    return max(cost_ms, request.min_interval_ms) / 1e3


class Acceptance:
    """Tells a gateway that its request is accepted, again and again until it is ended.

    Used in the event loop alone."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, hurry: bool) -> None:
        """Told at once if that is urgent."""
        if hurry:
            self.say()
        else:
            self._timer = asyncio.get_running_loop().call_later(AFTER_S, self.say)

    def say(self, handle: bytes | None = None) -> None:
        """Now, and again."""
        self._send(Accepted(handle), False)
        self._timer = asyncio.get_running_loop().call_later(AGAIN_S, self.say)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
