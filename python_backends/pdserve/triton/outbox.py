"""Responses on their way to Triton."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from pdserve import errors, supervision
from pdserve.node.heartbeat import Heartbeat
from pdserve.triton import backend

CLOSE_S = 5.0
# Looks at open requests take a fifth of a sending thread's time, a moment each.
LOOK_SHARE = 0.2
LOOK_MOMENT_S = 0.005


class Outbox:
    """All that is done with some requests' response senders, by one thread and in order.

    Sending and asking wait for the server, and the event loop must go on meanwhile. One
    thread to a request, since Triton frees what a sender stands for with its last response,
    and crashes when it is asked about it afterwards.

    Args:
        look_s: how often it is asked of each request whether its client has gone. Each look is a
            round trip to the server, so that many requests are looked at in turn: all looks
            together take LOOK_SHARE of the thread's time, which is then what bounds how often.
        gone: called once, in the outbox's thread, with the key of a request whose client has, or
            has not got a response that Triton would not take: it is to be ended.
        heartbeat: where it counts as ``thread``.
    """

    def __init__(
        self, look_s: float, gone: Callable[[str], None], heartbeat: Heartbeat, thread: int
    ) -> None:
        self._look_s = look_s
        self._gone = gone
        self._heartbeat = heartbeat
        self._number = thread
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Filled by ``open``, from then on the thread's.
        self._senders: dict[str, Any] = {}
        self._round: list[str] = []
        """Those that are still to be looked at, in this round."""
        self._watched: set[str] = set()
        self._torn: set[str] = set()
        """Those of which a response was refused."""
        self._thread = supervision.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def open(self, key: str, sender: Any) -> None:
        """Responses to a request may follow; ``key`` is unique among those that are open."""
        self._senders[key] = sender
        self._watched.add(key)

    def send(self, key: str, response: Any | None, *, last: bool) -> None:
        """Send a response to an open request; with the last one, or its absence, it is closed."""
        self._queue.put(partial(self._send, key, response, last))

    def close(self) -> None:
        """Send what is there, then end."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        next_look = next_round = 0.0
        while True:
            self._heartbeat.turned(self._number)
            with suppress(queue.Empty):
                work = self._queue.get(timeout=max(0.0, next_look - time.monotonic()))
                if work is None:
                    return
                self._do(work)
            if (now := time.monotonic()) < next_look:
                continue
            if not self._round:
                self._round = list(self._watched)
                next_round = now + self._look_s
            self._do(self._look)
            ended = time.monotonic()
            # The moment of the last look is paid for before the next.
            next_look = ended + (ended - now) * (1 / LOOK_SHARE - 1)
            if not self._round:
                next_look = max(next_look, next_round)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as failure:  # the thread serves every request: it may not end
            told = f"{type(failure).__name__}: {errors.brief(failure)}"
            pb_utils.Logger.log_error(f"a response could not be sent: {told}")

    def _send(self, key: str, response: Any | None, last: bool) -> None:
        if not last:
            try:
                self._senders[key].send(response)
            except Exception:
                # An answer with a hole in it would look like a whole one.
                self._torn.add(key)
                self._give_up(key)
                raise
        else:
            self._watched.discard(key)
            sender = self._senders.pop(key)
            if key in self._torn:  # the end may be on its way already
                self._torn.remove(key)
                response = backend.error(errors.PDServeError("a part of the answer is lost"))
            answer = () if response is None else (response,)
            sender.send(*answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._heartbeat.worked(self._number)

    def _look(self) -> None:
        """Look at the next requests of the round, for a moment."""
        end = time.monotonic() + LOOK_MOMENT_S
        while self._round and time.monotonic() < end:
            key = self._round.pop()
            if key in self._watched and self._senders[key].is_cancelled():
                self._give_up(key)

    def _give_up(self, key: str) -> None:
        if key in self._watched:
            self._watched.remove(key)
            self._gone(key)
