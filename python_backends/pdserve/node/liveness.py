"""Tells whether a model is alive by its heartbeat, and by a question where that does not tell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from pdserve.errors import InstanceError
from pdserve.node.heartbeat import Beats

Read = Callable[[], Sequence[Beats]]


class Liveness:
    """Looks at the heartbeat of a model, again and again; called, it tells whether the model lives.

    Each of its threads has to go on. Who takes requests and answers them is alive: only a model
    that does nothing of the kind is asked, and so the question never waits behind a burst. If the
    question is not answered, but others are meanwhile, the model is alive as well.

    Args:
        read: what each thread of the model has counted so far; empty: there is no heartbeat.
        ask: the question, by a request of its own. Raises: PDServeError, OSError: it has failed.
        within_s: how long a thread may stand still, and the answer may take.
    """

    def __init__(self, read: Read, ask: Callable[[], Awaitable[bool]], within_s: float) -> None:
        self._read = read
        self._ask = ask
        self._within_s = within_s
        self._work: int | None = None
        """What had been done when it was last looked at."""
        self._turned: list[tuple[int, float]] = []
        """Of each thread: its turns, and since when there are so many."""

    async def __call__(self) -> bool:
        """False: it is alive. Raises: PDServeError, OSError: it has failed the question."""
        beats = self._read()
        self._all_turn(beats)
        if self._works(beats):
            return False
        try:
            return await asyncio.wait_for(self._ask(), self._within_s)
        except asyncio.TimeoutError:
            if self._works(self._read()):
                return False
            raise InstanceError(f"no answer within {self._within_s:g} s") from None
        finally:
            self._works(self._read())  # the question itself has been work

    def _works(self, beats: Sequence[Beats]) -> bool:
        """Whether anything has been done since this was last called."""
        before, self._work = self._work, sum(one.work for one in beats)
        return before is not None and self._work != before

    def _all_turn(self, beats: Sequence[Beats]) -> None:
        """Raises: InstanceError: a thread has stood still."""
        now = asyncio.get_running_loop().time()
        known = self._turned if len(self._turned) == len(beats) else [(-1, now)] * len(beats)
        self._turned = [
            before if before[0] == one.turns else (one.turns, now)
            for before, one in zip(known, beats, strict=True)
        ]
        for number, (_, since) in enumerate(self._turned):
            if beats[number].turns and now - since > self._within_s:
                which = f"sending thread {number}" if number else "event loop"
                raise InstanceError(f"its {which} has stood still for {now - since:.1f} s")
