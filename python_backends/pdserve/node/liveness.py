"""Tells whether a model is alive by its heartbeat, and by a question if that is not conclusive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from pdserve.errors import InstanceError
from pdserve.node.heartbeat import Beats, stands

Read = Callable[[], Sequence[Beats]]


class Liveness:
    """Reads the heartbeat of a model; each call tells whether the model is alive.

    Each of its threads has to make progress. A model that takes requests and answers them is alive:
    only a model without work is asked, so the question never waits behind a burst. If the question
    is not answered, but others are meanwhile, the model is alive as well.

    Args:
        read: returns the counters of each thread of the model; empty: there is no heartbeat.
        ask: asks the model by a request. Raises PDServeError or OSError if it has failed.
        within_s: seconds for which a thread may make no progress, and within which the answer must
            come.
    """

    def __init__(self, read: Read, ask: Callable[[], Awaitable[bool]], within_s: float) -> None:
        self._read = read
        self._ask = ask
        self._within_s = within_s
        self._work: int | None = None
        """Number of requests and responses when they were last read."""
        self._turned: list[tuple[int, float]] = []
        """For each thread, its turns, and the time since which their number has not changed."""

    async def __call__(self) -> bool:
        """Return False if it is alive.

        Raises PDServeError or OSError if it has failed the question.
        """
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
        """Tell whether any work has been done since the last call."""
        before, self._work = self._work, sum(one.work for one in beats)
        return before is not None and self._work != before

    def _all_turn(self, beats: Sequence[Beats]) -> None:
        """Check that every thread makes progress. Raises InstanceError if one does not."""
        now = asyncio.get_running_loop().time()
        known = self._turned if len(self._turned) == len(beats) else [(-1, now)] * len(beats)
        self._turned = [
            before if before[0] == one.turns else (one.turns, now)
            for before, one in zip(known, beats, strict=True)
        ]
        for number, (_, since) in enumerate(self._turned):
            if beats[number].turns and now - since > self._within_s:
                raise InstanceError(stands(number, now - since))
