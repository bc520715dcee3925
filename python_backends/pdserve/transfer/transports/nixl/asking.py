"""A link over NIXL where the holder has to be asked to write: TCP. See `nixl/asks.py`."""

from __future__ import annotations

import time

import numpy as np

from pdserve.transfer.protocol import Memory, Pending, Spans, TransferError
from pdserve.transfer.transports.nixl.agent import Agent, until
from pdserve.transfer.transports.nixl.asks import (
    Answer,
    Ask,
    Hello,
    Mark,
    Peek,
    Push,
    Wait,
    decode_answer,
    encode,
)
from pdserve.transfer.transports.nixl.link import Alive, NixlLink, NixlPull, Way

# Interval of notes to a holder that is waited for: within this it is noticed that it has gone.
WAIT_S = 50e-3


class AskingLink(NixlLink):
    """Implements `Link` where the holder has to be asked."""

    operation = "put"

    def __init__(self, agent: Agent, peer: str, way: Way, memories: list[Memory]) -> None:
        super().__init__(agent, peer, way, memories)
        self._numbers = iter(range(1, 1 << 62))
        self._answers: dict[int, Answer] = {}
        self._said_at = 0.0

    def hello(self, deadline: float) -> None:
        """Introduce this receiver to the holder.

        Raises TransferError if the holder does not answer.
        """
        with self._or_close():
            ask = Hello(next(self._numbers), self._way.secret, self._agent.metadata())
            self._ask(ask, deadline)

    def peek(self, slot: int, deadline: float) -> bytes:
        self._slot(slot)
        with self._or_close():
            return self._ask(Peek(next(self._numbers), slot), deadline).slot

    def mark(self, slot: int, word: int, deadline: float) -> None:
        self._slot(slot)
        with self._or_close():
            self._ask(Mark(next(self._numbers), slot, word), deadline)

    def pull(self, spans: Spans, deadline: float) -> Pending:
        arrival = self._arrival(spans)
        seconds = max(deadline - time.monotonic(), 0.0)
        packed = np.ascontiguousarray(spans).tobytes()
        ask = Push(next(self._numbers), packed, arrival.device, seconds)
        with self._or_close():
            self._say(ask)
        return NixlPull(self, lambda alive: self._answer(ask.number, deadline, alive))

    def _say(self, ask: Ask) -> None:
        self._said_at = time.monotonic()
        self._agent.say(self._peer, encode(ask))

    def _ask(self, ask: Ask, deadline: float) -> Answer:
        self._say(ask)
        return self._answer(ask.number, deadline)

    def _answer(self, number: int, deadline: float, alive: Alive = lambda: None) -> Answer:
        answer = until(lambda: self._heard(number), deadline, alive=alive)
        if answer.error:
            raise TransferError(f"the holder says: {answer.error}")
        return answer

    def _heard(self, number: int) -> Answer | None:
        # The caller that polls stores the answers to all.
        for note in self._agent.notes().get(self._peer, ()):
            answer = decode_answer(note)
            self._answers[answer.number] = answer
        if time.monotonic() - self._said_at > WAIT_S:
            self._say(Wait(0))
        return self._answers.pop(number, None)
