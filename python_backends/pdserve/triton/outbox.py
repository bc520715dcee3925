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
# Share of a sending thread's time for checks of open requests, and the length of each series of
# checks.
LOOK_SHARE = 0.2
LOOK_MOMENT_S = 0.005


class Outbox:
    """All calls to some requests' response senders, made by one thread and in order.

    Sending and checking wait for the server, and the event loop must continue meanwhile. One thread
    serves a request, since Triton frees the sender's object with its last response, and crashes
    when it is asked about it afterwards.

    Args:
        look_s: interval of checks, for each request, whether its client has gone. Each check is a
            round trip to the server, so that many requests are checked in turn: all checks together
            take LOOK_SHARE of the thread's time, which then limits the interval.
        gone: called once, in the outbox's thread, with the key of a request whose client has gone,
            or has missed a response that Triton did not accept: the request must be ended.
        heartbeat: heartbeat in which it counts as ``thread``.
    """

    def __init__(
        self, look_s: float, gone: Callable[[str], None], heartbeat: Heartbeat, thread: int
    ) -> None:
        self._look_s = look_s
        self._gone = gone
        self._heartbeat = heartbeat
        self._number = thread
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Filled by ``open``, afterwards used by the thread only.
        self._senders: dict[str, Any] = {}
        self._round: list[str] = []
        """Requests that are still to be checked in this round."""
        self._watched: set[str] = set()
        self._torn: set[str] = set()
        """Requests of which a response was refused."""
        self._thread = supervision.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def open(self, key: str, sender: Any) -> None:
        """Register an open request, whose responses may follow.

        ``key`` is unique among open requests.
        """
        self._senders[key] = sender
        self._watched.add(key)

    def send(self, key: str, response: Any | None, *, last: bool) -> None:
        """Send a response to an open request; the last one, or its absence, closes the request."""
        self._queue.put(partial(self._send, key, response, last))

    def after(self, work: Callable[[], None]) -> None:
        """Call a function in the outbox's thread once Triton has all responses so far."""
        self._queue.put(work)

    def close(self) -> None:
        """Send what is queued, then end."""
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
            # The time of the last check is made up for before the next.
            next_look = ended + (ended - now) * (1 / LOOK_SHARE - 1)
            if not self._round:
                next_look = max(next_look, next_round)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as failure:  # the thread serves every request and must not end
            told = f"{type(failure).__name__}: {errors.brief(failure)}"
            pb_utils.Logger.log_error(f"a response could not be sent: {told}")

    def _send(self, key: str, response: Any | None, last: bool) -> None:
        if not last:
            try:
                self._senders[key].send(response)
            except Exception:
                # An answer with a missing part would look like a complete one.
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
        """Check the next requests of the round, for a moment."""
        end = time.monotonic() + LOOK_MOMENT_S
        while self._round and time.monotonic() < end:
            key = self._round.pop()
            if key in self._watched and self._senders[key].is_cancelled():
                self._give_up(key)

    def _give_up(self, key: str) -> None:
        if key in self._watched:
            self._watched.remove(key)
            self._gone(key)
