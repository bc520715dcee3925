"""The instance's end of a channel: replies on their way to the gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve.rpc import messages
from pdserve.rpc.messages import Reply

MAX_RESPONSES = 256
"""Responses to one request, before another carries the replies: Triton keeps some memory for each
response until its request has ended."""


class Call:
    """One request to this instance, until its last reply has been sent.

    Args:
        key: unique among the calls of this instance.
        request_id: ``stream/id``, where the stream is one connection of one gateway. A caller that
            names none has a stream of its own.
    """

    def __init__(self, key: str, request_id: str) -> None:
        self.key = key
        stream, slash, self.id = request_id.rpartition("/")
        self.stream = stream if slash else key
        self.carrier: _Carrier | None = None


class _Carrier:
    """A request whose responses carry replies to other calls of its stream, too."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.responses = 0
        self.calls: dict[str, Call] = {}
        """The calls whose replies it carries, by key."""
        self.batch: list[tuple[str, Reply]] = []


class Answers:
    """All replies of one instance; used in its event loop only.

    A call that is answered by one reply gets it as its own response. The longer answers of a stream
    share a *carrier*: the first of them lends its request until none is left, and all replies of
    one moment form one response. So a step of many sequences costs one message, and an idle stream
    keeps no request open that Triton would wait for before it unloads the model. After
    MAX_RESPONSES the request of the next answer becomes the carrier.

    Args:
        send: called with a call's key, a response to it (None: no further content) and whether it
            is the last one.
        epoch: name of this process, sent in each response.
    """

    def __init__(self, send: Callable[[str, bytes | None, bool], None], epoch: bytes = b"") -> None:
        self._send = send
        self._epoch = epoch
        self._calls: dict[str, Call] = {}
        self._carriers: dict[str, _Carrier] = {}

    def open(self, call: Call) -> None:
        """Note that replies to ``call`` will follow."""
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
        """Note that the caller of ``key`` has gone; return the ids of its calls.

        It carries no further call, whose missing caller would otherwise never be noticed.
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
        """Make ``carrier`` answer the calls that ``former`` has answered so far."""
        for call in former.calls.values():
            call.carrier = carrier
        carrier.calls, former.calls = former.calls, {}
        if not former.batch:  # otherwise it ends with its pending replies
            self._send(former.key, None, True)

    def _flush(self, stream: str, carrier: _Carrier) -> None:
        over = not carrier.calls
        if over and self._carriers.get(stream) is carrier:
            del self._carriers[stream]
        self._send(carrier.key, messages.encode_replies(carrier.batch, self._epoch), over)
        carrier.responses += 1
        carrier.batch = []
