"""Clients that ask the gateways of a world, and the answers that they have to get."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pdserve.gateway.parameters import Parameters
from pdserve.gateway.service import Part, Prompt
from pdserve.gateway.trace_context import Trace
from pdserve.scheduling.request import Request, State
from tests.simulation import words
from tests.unit.inprocess import EOS, Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdserve import config
    from pdserve.scheduling.scheduler import Scheduler
    from pdserve.text.vocabulary import Vocabulary
    from tests.simulation.asking import Asked
    from tests.simulation.gateways import Gateway

NOTHING: dict[str, Any] = {
    "max_tokens": None,
    "sampling": {},
    "stop": (),
    "stream": False,
    "ignore_eos": False,
    "scenario": "",
    "tenant": "",
    "priority": None,
    "ttft_limit_ms": None,
    "timeout_us": 0,
}
"""The parameters of a request that gives none."""


class Left(Exception):
    """A client has heard enough."""


@dataclass(slots=True)
class Told(Request):
    """A request that tells when a prefill has taken it."""

    accepted: Callable[[], None] = lambda: None

    def to(self, state: State, *args: Any) -> None:
        Request.to(self, state, *args)
        if state is State.PREFILLING:
            self.accepted()


@dataclass(eq=False)
class Client:
    """A client that asks for one answer."""

    asked: Asked
    gateway: Gateway
    model: Model
    vocabulary: Vocabulary
    deployment: config.Deployment | None = None
    """The deployment by which its request was routed."""
    request: Told | None = None
    """Its request; None: it has not reached a scheduler."""
    scheduler: Scheduler | None = None
    expected: list[int] = field(init=False)
    """The tokens of a whole answer."""
    reason: str = field(init=False)
    """The finish reason of a whole answer."""
    stop: tuple[str, ...] = ()
    heard: list[int] = field(default_factory=list)
    text: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    chunk: Callable[[], None] = lambda: None
    """It is called after each part is heard."""
    ended_at: float | None = None
    ended_in: State | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        asked = self.asked
        prompt = np.frombuffer(asked.prompt, "<i4")
        tokens: list[int] = []
        self.reason = "length"
        while len(tokens) < asked.max_tokens:
            tokens.append(self.model.token(prompt, len(tokens)))
            if tokens[-1] == EOS and not asked.fields.get("ignore_eos"):
                self.reason = "stop"
                break
        if 0 < asked.stops_after <= len(tokens) and words.is_word(tokens[asked.stops_after - 1]):
            self.stop = (self._stop_string(tokens[: asked.stops_after]),)
            self.reason = "stop"
            tokens = next(
                tokens[:count]
                for count in range(1, len(tokens) + 1)
                if self.stop[0] in self._searched(tokens[:count])
            )
        self.expected = tokens

    def _stop_string(self, tokens: list[int]) -> str:
        """Return the beginning of the last token, with the end of the word before it, if any."""
        before = tokens[-2:-1] if len(tokens) > 1 and words.is_word(tokens[-2]) else []
        return self.vocabulary.decode(before)[-1:] + self.vocabulary.decode(tokens[-1:])[:2]

    def _searched(self, tokens: list[int]) -> str:
        """Return the text in which stop strings are searched; it contains the special tokens."""
        pieces = [list(group) for _, group in itertools.groupby(tokens, EOS.__eq__)]
        return "".join(
            words.SPECIAL * len(piece) if piece[0] == EOS else self.vocabulary.decode(piece)
            for piece in pieces
        )

    @property
    def expected_text(self) -> str:
        """Return the text of a whole answer, which ends before a stop string."""
        text = self.vocabulary.decode(self.expected)
        return text[: text.rindex(self.stop[0])] if self.stop else text

    @property
    def beginning(self) -> str:
        """Return the beginning of its prompt if the prompt is text; otherwise nothing."""
        ids = np.frombuffer(self.asked.prompt[:16], "<i4").tolist()
        return self.vocabulary.decode(ids) if self.asked.in_text else ""

    @property
    def open(self) -> bool:
        return self.ended_at is None

    @property
    def brief(self) -> str:
        return brief(self.request) if self.request else f"request {self.asked.number}, not begun"

    async def ask(self) -> None:
        """Ask, and hear the answer. Raises: Left, and whatever the service raises."""
        asked, service = self.asked, self.gateway.service
        self.deployment = self.gateway.deployment
        answer = service.answer(str(asked.number), self._read, Trace(""))
        with service.admitted():
            async with aclosing(answer) as parts:
                count = 0
                async for part in parts:
                    count += 1
                    self._hear(part)
                    if count == asked.leaves_after and not part.finish_reason:
                        raise Left
                    # A client that has the last part has nothing left to give up.
                    if asked.reads_s and not part.finish_reason:
                        await asyncio.sleep(asked.reads_s)

    def _hear(self, part: Part) -> None:
        self.heard += part.ids
        self.text += part.text
        if part.stats:
            self.stats = json.loads(part.stats)
        self.chunk()

    async def _read(self) -> tuple[Parameters, Prompt]:
        asked = self.asked
        given = {"max_tokens": asked.max_tokens, "stop": self.stop, **asked.fields}
        ids = np.frombuffer(asked.prompt, "<i4")
        return Parameters(**{**NOTHING, **given}), Prompt(
            ids, beginning=self.beginning, in_text=asked.in_text
        )


def brief(request: Request) -> str:
    """Return what matters about a request when something is wrong with it."""
    return (
        f"request {request.id} {request.state.name}: {request.prompt_tokens} tokens, "
        f"{request.output_tokens} of {request.max_tokens} out, arrived {request.arrived:.4f}, "
        f"limits {request.ttft_limit_s:.4f} and {request.time_limit_s:.4f} s, "
        f"{request.attempts} attempts, {request.prefill or 'no prefill'}, "
        f"{request.decode or 'no decode'}"
    )
