"""Messages between gateways and workers: they keep their order, and may be late or lost."""

from __future__ import annotations

import contextvars
import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pdserve.errors import InstanceEnded, InstanceError, PDServeError
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import Busy, Failed
from pdserve.rpc.server import Answers, Call
from tests.unit.inprocess import submit

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from pdserve.control.assignment import Assignment
    from pdserve.instances.assigned import Assigned
    from pdserve.instances.decode import DecodeInstance
    from pdserve.instances.prefill import PrefillInstance
    from pdserve.rpc.messages import Reply, Request
    from pdserve.transfer.consumer.receiver import Receiver
    from pdserve.transfer.producer.holder import Holder
    from tests.simulation.loop import Loop, Process

# A message that is under way belongs to no process.
_NOWHERE = contextvars.Context()

ORPHAN_LOOK_S = 1.0
"""The interval is that of `pdserve.triton.instance`, which only the server can load."""


@dataclass
class Weather:
    """How messages travel in a world."""

    rng: random.Random
    delay_s: float
    """The longest delay of most messages."""
    tail: float
    """The share of messages that take up to `TAIL` times as long."""
    loss: float
    """The share of messages that do not arrive."""

    TAIL: ClassVar[float] = 60.0

    def delay(self) -> float:
        seconds = self.rng.uniform(0.0, self.delay_s)
        if self.tail and self.rng.random() < self.tail:
            seconds *= min(self.rng.paretovariate(0.8), self.TAIL)
        return seconds

    def loses(self) -> bool:
        return bool(self.loss) and self.rng.random() < self.loss


class Life:
    """One life of a worker: a server with one instance, from its start to its end.

    Args:
        memory: the memory where KV caches are, or arrive.
    """

    def __init__(
        self,
        process: Process,
        instance: PrefillInstance | DecodeInstance,
        memory: Holder | Receiver,
        assigned: Assigned,
    ) -> None:
        self.process = process
        self.instance = instance
        self.assigned = assigned
        self.memory = memory
        self._answers = Answers(self._send)
        self._keys = itertools.count()
        self._callers: dict[str, tuple[Connection, str]] = {}

    def arrive(self, connection: Connection, call: str, number: int, data: bytes) -> None:
        """Handle a request as the Triton model around an instance does."""
        ours = Call(f"{next(self._keys)}", f"{connection.id}/{call}")
        self._callers[ours.key] = connection, call
        self._answers.open(ours)
        reply = partial(self._reply, connection, ours)
        try:
            submit(self.assigned, number, messages.decode_request(data), reply)
        except PDServeError as error:
            reply(Failed(error.code, str(error)), True)

    def orphaned(self, connection: Connection) -> None:
        """Release the calls of a connection, since nobody hears any more what is sent over it."""
        for key, (caller, _) in list(self._callers.items()):
            if caller is connection:
                for call in self._answers.abandon(key):
                    self.assigned.release(call, lambda _reply, _last: None)

    def _reply(self, connection: Connection, call: Call, reply: Reply, last: bool) -> None:
        if isinstance(reply, Busy):
            connection.refused = reply.reason
        self._answers.reply(call, reply, last)

    def _send(self, key: str, data: bytes | None, last: bool) -> None:
        connection, call = self._callers[key]
        if last:
            del self._callers[key]
        if data is not None:
            connection.send_back(call, data)


class Worker:
    """The place of an instance, which stays the same from one life to the next."""

    def __init__(self, name: str, assignment: Assignment) -> None:
        self.name = name
        self.assignment = assignment
        """The assignment that it keeps from one life to the next."""
        self.life: Life | None = None
        self.unplugged = False
        """Nobody is told that it is gone: messages to it are never answered."""


class Connection:
    """One stream between a gateway and a worker; each direction keeps its order."""

    _numbers = itertools.count()

    def __init__(self, wire: Wire) -> None:
        self.id = f"{next(self._numbers)}"
        self.life: Life | None = None
        """The life that it leads to; None: no message has arrived yet."""
        self.refused = ""
        """The reason why an offer was last refused."""
        self._wire = wire
        self._open = True
        self._last = {"in": 0.0, "out": 0.0}

    def send(self, call: str, data: bytes) -> None:
        if not self._wire.weather.loses():
            when = self._when("in")
            self._wire.loop.call_at(when, self._arrive, call, data, context=_NOWHERE)

    def send_back(self, call: str, data: bytes) -> None:
        if self._open and self._there and not self._wire.weather.loses():
            self._wire.gateway.call_at(self._when("out"), self._arrive_back, call, data)

    def break_(self, reason: str) -> None:
        """Break it: the gateway notices in a moment, the worker when it looks for orphans."""
        if not self._open:
            return
        self._open = False
        wire = self._wire
        now = wire.loop.time()
        wire.gateway.call_at(now + wire.weather.delay(), wire.broken, self, reason)
        if self.life is not None:
            look = now + wire.weather.rng.uniform(0, ORPHAN_LOOK_S)
            self.life.process.call_at(look, self.life.orphaned, self)

    @property
    def _there(self) -> bool:
        return self.life is not None and self.life.process.alive

    def _when(self, way: str) -> float:
        """Return when a message arrives: after the one before, as equal timers have no order."""
        wire = self._wire
        when = max(wire.loop.time() + wire.weather.delay(), wire.cut_until)
        self._last[way] = max(when, self._last[way] + 2e-6)
        return self._last[way]

    def _arrive(self, call: str, data: bytes) -> None:
        worker = self._wire.worker
        if not self._open or worker.unplugged:
            return
        if self.life is None:
            self.life = worker.life
        if self.life is None or not self._there:
            self.break_("connection refused" if self.life is None else "connection reset")
        else:
            self.life.process.call(self.life.arrive, self, call, self._wire.number, data)

    def _arrive_back(self, call: str, data: bytes) -> None:
        if self._open:
            self._wire.heard(call, data)


class Wire:
    """A gateway's channel to a worker: what `GrpcChannel` is in a deployment."""

    def __init__(
        self, loop: Loop, gateway: Process, worker: Worker, weather: Weather, number: int
    ) -> None:
        self.number = number
        self.loop = loop
        self.gateway = gateway
        self.worker = worker
        self.weather = weather
        self.calls = Calls()
        self.cut_until = 0.0
        """Messages that are sent before this time do not arrive until then."""
        self.connection: Connection | None = None
        self.closed = False
        self.sent: Callable[[Request], None] = lambda request: None
        self.got: Callable[[bytes], None] = lambda data: None
        self.broke: Callable[[Sequence[str]], None] = lambda calls: None
        """These three are told of its messages, and of the calls that are open when it breaks."""

    def open(self, call: str, request: Request) -> Replies:
        replies = self.calls.open(call)
        if self.gateway.alive:
            self.sent(request)
            if self.closed:
                replies.fail(InstanceError("the channel is closed"))
                return replies
            if self.connection is None:
                self.connection = Connection(self)
            self.connection.send(call, messages.encode(request))
        return replies

    def forget(self, call: str) -> None:
        self.calls.forget(call)

    def lose(self, _epoch: bytes = b"") -> None:
        if self.connection is not None:
            self.connection.break_("its process is gone")

    async def close(self) -> None:
        self.lose()
        self.closed = True
        if self.connection is not None:
            self.broken(self.connection, "the stream was closed")

    def heard(self, call: str, data: bytes) -> None:
        self.got(data)
        self.calls.deliver(call, data)

    def broken(self, connection: Connection, reason: str) -> None:
        if self.connection is connection:
            self.connection = None
            self.broke(list(self.calls._replies))
            kind = InstanceError if connection.life is None else InstanceEnded
            self.calls.fail_all(kind(f"{self.worker.name}: {reason}"))
