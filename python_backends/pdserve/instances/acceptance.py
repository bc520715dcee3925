"""When and how often a gateway is told that its request has been accepted and is worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve import config
from pdserve.instances.protocol import Send, Sent, sent_at_once
from pdserve.rpc.messages import Accepted, DecodeRequest

# A result that comes sooner than this is sent without an acceptance; otherwise the acceptance is
# sent first, and repeated while the computation lasts, since silence would count as a stall.
AFTER_S = 0.005
AGAIN_S = 5.0
# Seconds from the moment at which the server has a suspect's acceptance to its computation: within
# them the gateway gets it, so that it knows which request was on trial when this process ends.
TRIAL_S = 0.02


def interval_s(limits: config.Decode, streams: int, request: DecodeRequest) -> float:
    """Return the seconds between two responses of a request: the cost of all responses, bounded.

    A decode multiplies its own open ``streams`` by the request's ``peers`` to estimate the streams
    of its gateway, since a gateway spreads its requests evenly. A request may also ask for a longer
    interval.
    """
    cost_ms = min(limits.response_cost_ms * streams * request.peers, limits.max_interval_ms)
    return max(cost_ms, request.min_interval_ms) / 1e3


class Trials:
    """Begins to compute suspects once their acceptance is on its way, whatever they do.

    Used in the event loop only.
    """

    def __init__(self) -> None:
        self.sent: Sent = sent_at_once

    def begin(self, work: Callable[[], None]) -> None:
        """Call ``work`` TRIAL_S after the server has the replies that have been given so far."""

        def sent() -> None:
            asyncio.get_running_loop().call_later(TRIAL_S, work)

        self.sent(sent)

    async def begun(self) -> None:
        """Wait until what has been accepted before may be computed."""
        over = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not over.done():  # else it is not waited for any more
                over.set_result(None)

        self.begin(begin)
        await over


class Acceptance:
    """Tells a gateway that its request is accepted, again and again until it is ended.

    Used in the event loop only."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, hurry: bool) -> None:
        """Tell it after AFTER_S, or at once if that is urgent."""
        if hurry:
            self.say()
        else:
            self._timer = asyncio.get_running_loop().call_later(AFTER_S, self.say)

    def say(self, handle: bytes | None = None) -> None:
        """Tell it now, and again every AGAIN_S seconds."""
        self._send(Accepted(handle), False)
        self._timer = asyncio.get_running_loop().call_later(AGAIN_S, self.say)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
