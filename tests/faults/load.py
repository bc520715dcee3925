"""Streams in the background during a fault; all answers, gaps and errors are recorded."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import tritonclient.grpc.aio as aio

from pdserve.engines.emulated import EmulatedModel
from tests import clients

if TYPE_CHECKING:
    from typing_extensions import Self

    from tests.servers import Running

LIMIT_S = 60.0
"""No request may take longer: such a stream has been forgotten."""
PROMPT_TOKENS = 40, 120
LOOK_S = 0.5
"""How often a client that waits for the next stream checks whether the load is over."""
LEAVE_S = 1.0
"""The latest moment at which a client leaves."""


@dataclass
class Stream:
    """One request; times are ``time.monotonic()``."""

    prompt: list[int]
    wanted: int
    began: float = field(default_factory=time.monotonic)
    at: list[float] = field(default_factory=list)
    """The arrival of each response."""
    ids: list[int] = field(default_factory=list)
    attempts: int = 0
    error: BaseException | None = None
    ended: float = 0.0
    left: bool = False
    """The client has left before the end."""

    @property
    def gap(self) -> float:
        """Return the longest wait for a response after the first."""
        return max((b - a for a, b in itertools.pairwise(self.at)), default=0.0)


class Load:
    """Sends ``rate`` streams per second within a block, one connection each.

    At the end it waits for open streams.

    Args:
        tokens: tokens of each answer.
        timeout: seconds after which the client itself gives up.
        leaving: share of the clients that leave within `LEAVE_S`.
    """

    def __init__(
        self,
        server: Running,
        *,
        rate: float,
        tokens: int,
        seed: int = 0,
        timeout: float = LIMIT_S,
        leaving: float = 0.0,
    ) -> None:
        self.streams: list[Stream] = []
        self._server = server
        self._rate = rate
        self._tokens = tokens
        self._timeout = timeout
        self._leaving = leaving
        self._rng = random.Random(seed)
        self._model = EmulatedModel(server.deployment.model, server.deployment.engine.profile)
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(self._timeout + 10)
        assert not self._thread.is_alive()

    # -------------------------------------------------------------------------------------- results

    @property
    def lost(self) -> list[str]:
        """Return the streams that ended with an error, and the errors."""
        return [
            f"after {len(one.ids)} tokens: {one.error!r:.300}" for one in self.streams if one.error
        ]

    @property
    def wrong(self) -> list[str]:
        """Return the streams whose tokens are not all those of an undisturbed system."""
        found = []
        for one in self.streams:
            expected = self._expected(one)
            if one.left:
                expected = expected[: len(one.ids)]
            if not one.error and one.ids != expected:
                pairs = enumerate(zip(one.ids, expected, strict=False))
                first = next((i for i, (a, b) in pairs if a != b), None)
                found.append(f"{len(one.ids)} of {one.wanted} tokens; the first other one: {first}")
        return found

    @property
    def gap(self) -> float:
        """Return the longest wait between two responses of a stream."""
        return max(one.gap for one in self.streams)

    @property
    def ttft(self) -> float:
        """Return the longest wait for a first response."""
        return max(one.at[0] - one.began for one in self.streams if one.at)

    @property
    def retried(self) -> int:
        """Return the streams that took more than one attempt."""
        return sum(one.attempts > 1 for one in self.streams)

    def open_at(self, moment: float) -> list[Stream]:
        """Return the streams that had begun to answer at this time, and had not ended."""
        return [one for one in self.streams if one.at and one.at[0] < moment < one.ended]

    def _expected(self, one: Stream) -> list[int]:
        prompt = np.array(one.prompt, "<i4")
        return [self._model.token(prompt, position) for position in range(one.wanted)]

    # -------------------------------------------------------------------------------------- sending

    async def _run(self) -> None:
        tasks = []
        began = time.monotonic()
        while not self._over.is_set():
            tasks.append(asyncio.create_task(self._one()))
            next_at = began + len(tasks) / self._rate
            while not self._over.is_set() and (left := next_at - time.monotonic()) > 0:
                await asyncio.sleep(min(left, LOOK_S))
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        count = self._rng.randint(*PROMPT_TOKENS)
        one = Stream([self._rng.randrange(3, 40_000) for _ in range(count)], self._tokens)
        self.streams.append(one)
        stays = self._leaving == 0.0 or self._rng.random() >= self._leaving
        try:
            await asyncio.wait_for(
                self._read(one), None if stays else self._rng.uniform(0.0, LEAVE_S)
            )
        except asyncio.TimeoutError:
            one.left = True
        except Exception as error:
            one.error = error
        finally:
            one.ended = time.monotonic()

    async def _read(self, one: Stream) -> None:
        async with aio.InferenceServerClient(
            self._server.grpc, channel_args=[("grpc.use_local_subchannel_pool", 1)]
        ) as client:
            async for part in clients.stream(
                client,
                "scheduler",
                input_ids=one.prompt,
                max_tokens=one.wanted,
                stream=True,
                ignore_eos=True,
                timeout=self._timeout,
            ):
                one.at.append(part.at)
                one.ids += part.ids
                one.attempts = part.stats["attempts"] if part.stats else 0
