"""The holder's side of `nixl/asks.py`."""

from __future__ import annotations

import ctypes
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from hmac import compare_digest

import msgspec
import numpy as np

from pdserve.transfer.lease.words import RECEIVER_WORD, SLOT_BYTES, pack_word
from pdserve.transfer.protocol import Memory, TransferError, Unreachable
from pdserve.transfer.transports.nixl.agent import MOVED_S, Agent, Ranges, Transfer
from pdserve.transfer.transports.nixl.asks import (
    Answer,
    Ask,
    Hello,
    Mark,
    Peek,
    Push,
    Wait,
    check,
    decode_ask,
    encode,
)

_log = logging.getLogger(__name__)

# A receiver that has asked will ask again: until it has been silent for LINGER_S, it is not kept
# waiting, however seldom `progress` is called; nor are others that need progress in its thread,
# longer than STAY_S.
LINGER_S = 20e-3
STAY_S = 100e-3
# Pause between two polls that have moved nothing.
NAP_S = 50e-6


@dataclass(slots=True)
class _Running:
    peer: str
    number: int
    transfer: Transfer
    deadline: float


class Server:
    """The holder's side."""

    def __init__(self, agent: Agent, table: Memory, data: Memory, secret: bytes) -> None:
        if table.device is not None:
            raise Unreachable(f"the lease table is on device {table.device}, not in host memory")
        self._agent = agent
        words = (ctypes.c_uint8 * table.nbytes).from_address(table.address)
        self._table = memoryview(words).cast("B")
        self._owner = table.owner
        self._data = data
        self._secret = secret
        self._peers: set[str] = set()
        self._running: list[_Running] = []
        self._asked_at = 0.0

    def serve(self) -> None:
        """Do what receivers ask for, and keep polling for a moment after the last ask."""
        end = time.monotonic() + STAY_S
        while True:
            began = time.monotonic()
            self._step()
            now = time.monotonic()
            if now > end or now - self._asked_at > LINGER_S:
                return
            if now - began < MOVED_S * (1 + len(self._running)):
                time.sleep(NAP_S)

    def _step(self) -> None:
        notes = self._agent.notes()
        for peer, asks in notes.items():
            for ask in asks:
                try:
                    self._do(peer, decode_ask(ask))
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    _log.warning("ask of receiver %s: %s", peer, error)
                except TransferError as error:
                    self._leave(peer, str(error))
        for running in list(self._running):
            self._follow(running)
        if notes or self._running:
            self._asked_at = time.monotonic()

    def _do(self, peer: str, ask: Ask) -> None:
        if isinstance(ask, Hello):
            self._greet(peer, ask)
        elif peer not in self._peers:
            _log.info("ask of receiver %s, which has not said hello, or was left", peer)
        elif isinstance(ask, Push):
            self._push(peer, ask)
        elif not isinstance(ask, Wait):
            self._agent.say(peer, encode(self._look(ask)))

    def _greet(self, peer: str, hello: Hello) -> None:
        if not compare_digest(hello.secret, self._secret):
            _log.warning("receiver %s does not know this holder's secret", peer)
            return
        # Sending to a receiver that has gone reveals it; see `Wait`.
        for other in list(self._peers):
            self._answer(other, Answer(0))
        name = self._agent.connect(hello.metadata)
        if name != peer:
            self._agent.forget(name)
            _log.warning("receiver %s has shown the metadata of %s", peer, name)
            return
        self._peers.add(peer)
        self._answer(peer, Answer(hello.number))

    def _look(self, ask: Peek | Mark) -> Answer:
        start = ask.slot * SLOT_BYTES
        if start >= len(self._table):
            return Answer(ask.number, f"there is no lease slot {ask.slot}")
        if isinstance(ask, Peek):
            return Answer(ask.number, slot=bytes(self._table[start : start + SLOT_BYTES]))
        word = pack_word(ask.word)
        start += RECEIVER_WORD
        self._table[start : start + len(word)] = word
        return Answer(ask.number)

    def _push(self, peer: str, ask: Push) -> None:
        try:
            spans = np.frombuffer(ask.spans, np.int64).reshape(-1, 3)
            check(spans, self._data.nbytes)
            local = Ranges(spans[:, 0] + self._data.address, spans[:, 2], self._data.device)
            remote = Ranges(spans[:, 1], spans[:, 2], ask.device)
            behind = encode(Answer(ask.number))
            transfer = self._agent.begin("WRITE", peer, local, remote, behind)
        except (TransferError, ValueError) as error:
            self._answer(peer, Answer(ask.number, str(error)))
            return
        if not transfer.done:
            deadline = time.monotonic() + ask.seconds
            self._running.append(_Running(peer, ask.number, transfer, deadline))

    def _follow(self, running: _Running) -> None:
        try:
            if self._agent.poll(running.transfer):
                self._running.remove(running)
            elif time.monotonic() > running.deadline:
                self._leave(running.peer, "it has not taken what it asked for in time")
        except TransferError as error:
            self._leave(running.peer, str(error))

    def _answer(self, peer: str, answer: Answer) -> None:
        try:
            self._agent.say(peer, encode(answer))
        except TransferError as error:
            self._leave(peer, str(error))

    def _leave(self, peer: str, why: str) -> None:
        """Drop a receiver. Bytes still on their way may arrive.

        The receiver protects its own memory.
        """
        _log.info("receiver %s: %s", peer, why)
        if peer not in self._peers:
            return
        self._peers.discard(peer)
        for running in [r for r in self._running if r.peer == peer]:
            self._running.remove(running)
            with suppress(TransferError):
                self._agent.end(running.transfer)
        with suppress(TransferError):
            self._agent.forget(peer)
