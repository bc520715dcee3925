"""One request, from its arrival to its one end.

::

    WAITING ──► PREFILLING ──► PREFILLED ──► TRANSFERRING ──► DECODING ──► FINISHED
       │             │             │               │              │
       │             └─────────────┴───────┬───────┴──────────────┘
       │                                   │
       ├─► REJECTED   it can never be served, or too many wait already
       ├─► EXPIRED    no prefill took it, or no first token came, within its TTFT limit
       ├─► CANCELLED ◄─────────────────────┤ the client is gone
       └─► FAILED    ◄─────────────────────┘ an instance failed and no other could go on

A request that needs no decode (its first token ends it) goes from PREFILLED to
FINISHED. A prefill that fails sends it back to WAITING. While all decodes are busy it
stays PREFILLED; that a decode follows the prefill layer by layer is no state of its
own. EXPIRED is reached from PREFILLING and PREFILLED too: the limit is checked before
and after prefill, never during; and REJECTED from PREFILLING: a prefill may find that
it can never hold the prompt.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pdserve.messages import Sampling
from pdserve.transfer.reports import NOTHING_PULLED, Pulled


class State(enum.Enum):
    WAITING = enum.auto()
    PREFILLING = enum.auto()
    PREFILLED = enum.auto()
    TRANSFERRING = enum.auto()
    DECODING = enum.auto()
    FINISHED = enum.auto()
    REJECTED = enum.auto()
    EXPIRED = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


FINAL = frozenset({State.FINISHED, State.REJECTED, State.EXPIRED, State.CANCELLED, State.FAILED})
_NEXT = {
    State.WAITING: {State.PREFILLING, State.REJECTED, State.EXPIRED},
    State.PREFILLING: {State.PREFILLED, State.WAITING, State.REJECTED, State.EXPIRED},
    State.PREFILLED: {State.TRANSFERRING, State.FINISHED, State.EXPIRED},
    State.TRANSFERRING: {State.DECODING},
    State.DECODING: {State.FINISHED},
}

FinishReason = Literal["stop", "length", ""]


@dataclass(slots=True)
class Request:
    """What is asked, and what has become of it so far. Times are ``loop.time()`` seconds."""

    id: str
    prompt: bytes
    """Token ids, little-endian int32."""
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False
    ignore_eos: bool = False
    tenant: str = ""
    scenario: str = "default"
    priority: int = 0
    """Among waiting requests the higher goes first."""
    ttft_limit_s: float = 60.0

    state: State = State.WAITING
    finish_reason: FinishReason = ""
    output_tokens: int = 0
    cached_tokens: int = 0
    attempts: int = 0
    prefill: str = ""
    decode: str = ""
    prefill_ms: float = 0.0
    pulled: Pulled | None = None
    """How its KV cache came to the decode."""
    arrived: float = 0.0
    forwarded: float = 0.0
    """When the prefill that took it was offered it."""
    first_token: float = 0.0
    ended: float = 0.0
    _answer_ends_at: int | None = field(default=None, repr=False)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def deadline(self) -> float:
        return self.arrived + self.ttft_limit_s

    def to(self, state: State) -> None:
        """Move on; a request that has ended never moves again."""
        always = {State.CANCELLED, State.FAILED}
        if state not in _NEXT.get(self.state, set()) | (set() if self.state in FINAL else always):
            raise AssertionError(f"request {self.id}: {self.state.name} -> {state.name}")
        self.state = state

    def end_answer(self, output_tokens: int) -> None:
        """Called by who reads the tokens: a stop string is complete, nothing more is wanted."""
        self._answer_ends_at = output_tokens

    @property
    def answer_ended(self) -> bool:
        return self._answer_ends_at is not None

    def finish(self, reason: FinishReason, now: float) -> None:
        """The one good end."""
        if self._answer_ends_at is not None:
            self.output_tokens, reason = self._answer_ends_at, "stop"
        self.finish_reason = reason
        self.ended = now
        self.to(State.FINISHED)

    def stats(self) -> dict[str, Any]:
        """The public ``stats`` of the last response; times in milliseconds."""

        def ms(since: float, until: float) -> float:
            return round((until - since) * 1e3, 3)

        pulled = self.pulled or NOTHING_PULLED
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "attempts": self.attempts,
            "group": "default",
            "prefill": self.prefill,
            "decode": self.decode,
            "ms": {
                "forward": ms(self.arrived, self.forwarded),
                "prefill": round(self.prefill_ms, 3),
                "transfer": round(pulled.ms, 3),
                "exposed": round(pulled.exposed_ms, 3),
                "ttft": ms(self.arrived, self.first_token),
                "e2e": ms(self.arrived, self.ended),
            },
            "kv": {
                "bytes": pulled.nbytes,
                "transport": pulled.transport,
                "strategy": pulled.strategy,
                "expected_ms": round(pulled.expected_ms, 3),
            },
        }


@dataclass(slots=True, frozen=True)
class Chunk:
    """New tokens of an answer; the last one carries the finish reason."""

    ids: Sequence[int]
    finish_reason: FinishReason = ""
