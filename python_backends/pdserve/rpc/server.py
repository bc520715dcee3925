"""The instance's end of a channel: replies on their way to the gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve.rpc import messages
from pdserve.rpc.messages import Reply

MAX_RESPONSES = 256
"""By one request, before another takes over: Triton keeps something of each until it has ended."""


class Call:
    """One request to this instance, until its last reply has been given.

    Args:
        key: unique among the calls of this instance.
        request_id: ``stream/id``, where the stream is one connection of one gateway. A caller
            that names none has a stream of its own.
    """

    def __init__(self, key: str, request_id: str) -> None:
        self.key = key
        stream, slash, self.id = request_id.rpartition("/")
        self.stream = stream if slash else key
        self.carrier: _Carrier | None = None


class _Carrier:
    """The request that answers others of its stream, too."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.responses = 0
        self.calls: dict[str, Call] = {}
        """Those that are being answered, by key."""
        self.batch: list[tuple[str, Reply]] = []


class Answers:
    """Every reply of one instance; used in its event loop alone.

    A call that is answered by one reply gets it as its own response. The longer answers of a
    stream share a *carrier*: the first of them lends its request until none is left, and what
    is said to all of them at one moment is one response. So a step of many sequences costs one
    message, and an idle stream keeps nothing open that Triton would wait for before it unloads
    the model. After MAX_RESPONSES the next answer's request takes over.

    Args:
        send: given a call's key, a response to it (None: nothing more to say) and whether it is
            the last one.
        epoch: names this process in each response.
    """

    def __init__(self, send: Callable[[str, bytes | None, bool], None], epoch: bytes = b"") -> None:
        self._send = send
        self._epoch = epoch
        self._calls: dict[str, Call] = {}
        self._carriers: dict[str, _Carrier] = {}

    def open(self, call: Call) -> None:
        """Replies to ``call`` will follow."""
        self._calls[call.key] = call

    def reply(self, call: Call, reply: Reply, last: bool) -> None:
        if last:
            del self._calls[call.key]
            if call.carrier is None:
                self._send(call.key, messages.encode_replies([(call.id, reply)], self._epoch), True)
                return
        carrier = call.carrier or self._carry(call)
        if not carrier.batch:
            asyncio.get_running_loop().call_soon(self._flush, call.stream, carrier)
        carrier.batch.append((call.id, reply))
        if last:
            del carrier.calls[call.key]

    def abandon(self, key: str) -> list[str]:
        """The caller of ``key`` has gone: the ids of the calls that it would have heard of.

        No further call is carried by it: one that comes late would never be noticed as unheard.
        """
        for stream, carrier in self._carriers.items():
            if carrier.key == key:
                del self._carriers[stream]
                return [call.id for call in carrier.calls.values()]
        return [self._calls[key].id] if key in self._calls else []

    def _carry(self, call: Call) -> _Carrier:
        carrier = self._carriers.get(call.stream)
        if carrier is not None and carrier.responses < MAX_RESPONSES:
            self._send(call.key, None, True)
        else:
            former, carrier = carrier, _Carrier(call.key)
            self._carriers[call.stream] = carrier
            if former is not None:
                self._retire(former, carrier)
        carrier.calls[call.key] = call
        call.carrier = carrier
        return carrier

    def _retire(self, former: _Carrier, carrier: _Carrier) -> None:
        """Another answers from now on what ``former`` has answered so far."""
        for call in former.calls.values():
            call.carrier = carrier
        carrier.calls, former.calls = former.calls, {}
        if not former.batch:  # else it ends with what it is about to say
            self._send(former.key, None, True)

    def _flush(self, stream: str, carrier: _Carrier) -> None:
        over = not carrier.calls
        if over and self._carriers.get(stream) is carrier:
            del self._carriers[stream]
        self._send(carrier.key, messages.encode_replies(carrier.batch, self._epoch), over)
        carrier.responses += 1
        carrier.batch = []
