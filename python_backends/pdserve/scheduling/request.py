"""One request, from its arrival to its end.

::

    WAITING ──► PREFILLING ──► PREFILLED ──► TRANSFERRING ──► DECODING ──► FINISHED
     ▲    │          │             │               │              │
     │    └──────────┼─────────────┼───────────────┼─────────────►│ (a decode computes it whole)
     └───────────────┴─────────────┴───────────────┴──────────────┤ an instance failed: once more,
                                                                  │ from the tokens so far
       ├─► REJECTED   it can never be served, or too many wait already
       ├─► EXPIRED    no prefill took it, or no first token came, within its TTFT limit;
       │              or its own time limit has passed
       ├─► CANCELLED  the client is gone
       └─► FAILED     an instance failed and no other could go on

A request that needs no decode (its first token ends it) goes from PREFILLED to FINISHED. While
all decodes are busy it stays PREFILLED; that a decode follows the prefill layer by layer is no
state of its own. The TTFT limit is checked before and after prefill, never during; REJECTED is
reached from PREFILLING too: a prefill may find that it can never hold the prompt.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pdserve.config import Role
from pdserve.sampling import Sampling
from pdserve.scheduling.room import Promise
from pdserve.scheduling.wait_queue import Order
from pdserve.transfer.reports import NO_TRANSFER, TransferReport


class State(enum.Enum):
    __hash__ = object.__hash__  # Enum's own is a Python function, called for each look-up

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
    State.WAITING: {State.PREFILLING, State.DECODING, State.REJECTED},
    State.PREFILLING: {State.PREFILLED, State.WAITING, State.REJECTED},
    State.PREFILLED: {State.TRANSFERRING, State.FINISHED, State.WAITING},
    State.TRANSFERRING: {State.DECODING, State.WAITING},
    State.DECODING: {State.FINISHED, State.WAITING},
}
# From any state that is not final.
_ALWAYS = {State.EXPIRED, State.CANCELLED, State.FAILED}

# A request whose answer has begun is not given up for being late before this.
RECOVER_S = 30.0
# Seconds of waiting that outweigh one level of priority.
PRIORITY_S = 10.0

FinishReason = Literal["stop", "length", ""]


class Answer(enum.Enum):
    ACCEPTED = enum.auto()
    BUSY = enum.auto()
    REASSIGNED = enum.auto()
    """It serves nothing under this assignment any more."""
    FAILED = enum.auto()


class Offer(NamedTuple):
    """The offer of a request to an instance, with the instance's answer."""

    instance: str
    began: float
    ended: float
    answer: Answer


@dataclass(slots=True)
class Request:
    """A request and its state. Times are ``loop.time()`` seconds."""

    id: str
    prompt: bytes
    """Token ids, little-endian int32."""
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False
    ignore_eos: bool = False
    tenant: str = ""
    scenario: str = "default"
    group: str = "default"
    priority: int = 0
    """Among waiting requests the one with the highest priority goes first."""
    ttft_limit_s: float = 60.0
    ttft_limit_of: str = ""
    """Errors name this as the one that sets the limit: the request, a scenario or the gateway."""
    time_limit_s: float = math.inf
    """Seconds from its arrival to its end."""
    trace: str = ""
    """W3C traceparent; empty: the request is not traced."""

    state: State = State.WAITING
    history: list[tuple[float, State]] = field(default_factory=list, repr=False)
    """Times at which it entered each state but the first."""
    offers: list[Offer] = field(default_factory=list, repr=False)
    ends: dict[Role, list[str]] = field(
        default_factory=lambda: {"prefill": [], "decode": []}, repr=False
    )
    """Instances, by role, that ended while it was there without progress; see `suspicion`."""
    finish_reason: FinishReason = ""
    output: bytearray = field(default_factory=bytearray, repr=False)
    """Token ids, encoded like ``prompt``."""
    output_tokens: int = 0
    cached_tokens: int = 0
    attempts: int = 0
    """Number of prefills, or decodes in their place, that accepted it."""
    prefill: str = ""
    decode: str = ""
    prefill_ms: float = 0.0
    transfer: TransferReport | None = None
    """How its KV cache was transferred to the decode."""
    arrived: float = 0.0
    promise: Promise = field(default_factory=lambda: Promise(None, 0), repr=False)
    """Room in a decode that is promised to it."""
    moves: int = 0
    """Number of times that it has gone on elsewhere since an instance has left it."""
    held_back: bool = False
    """True if its first token is held back until a decode has accepted it."""
    waiting_since: float = 0.0
    """Time of its arrival, or of the failure of the instance that had it."""
    forwarded: float = 0.0
    """Time at which it was offered to the prefill that accepted it."""
    first_token: float = 0.0
    ended: float = 0.0
    _answer_ends_at: int | None = field(default=None, repr=False)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def tokens_so_far(self) -> int:
        """Return the number of tokens of prompt and output together."""
        return (len(self.prompt) + len(self.output)) // 4

    @property
    def deadline(self) -> float:
        """Return the deadline of the first token, or of the next one if a pair resumes it."""
        limit = RECOVER_S if self.output else self.ttft_limit_s
        return min(self.waiting_since + limit, self.ends_by)

    @property
    def ends_by(self) -> float:
        return self.arrived + self.time_limit_s

    @property
    def order(self) -> Order:
        """Return its order among waiting requests: begun answers, then priority, deadline.

        A level of priority is worth ``PRIORITY_S`` of waiting, so that no request starves.
        """
        return not self.output, self.deadline - PRIORITY_S * self.priority

    @property
    def so_far(self) -> bytes:
        """Return the token ids of prompt and output, from which another pair resumes."""
        return self.prompt + self.output

    def to(self, state: State, now: float) -> None:
        """Change the state; a request that has ended never changes it again."""
        if state not in _NEXT.get(self.state, set()) | (set() if self.state in FINAL else _ALWAYS):
            raise AssertionError(f"request {self.id}: {self.state.name} -> {state.name}")
        self.state = state
        self.history.append((now, state))

    def add(self, ids: bytes) -> list[int]:
        """Add new tokens to the answer, and return them as numbers."""
        self.output += ids
        self.output_tokens += len(ids) // 4
        return list(memoryview(ids).cast("i")) if ids else []

    def take_back(self, tokens: int) -> None:
        """Remove the last tokens, which have been sent to nobody and will be computed again."""
        del self.output[len(self.output) - 4 * tokens :]
        self.output_tokens -= tokens

    def end_answer(self, output_tokens: int) -> None:
        """Note that the answer ends after so many tokens, since a stop string is complete."""
        self._answer_ends_at = output_tokens

    @property
    def answer_ended(self) -> bool:
        return self._answer_ends_at is not None

    def again(self, now: float) -> None:
        """Put it back in the queue after a failure.

        A limit for the first token goes on as it was.
        """
        if self.state is not State.WAITING:
            self.to(State.WAITING, now)
        if self.output:
            self.waiting_since = now

    def ended_by(self, chunk: Chunk, now: float) -> bool:
        """Tell whether the answer is complete with this chunk; if so, finish the request."""
        if chunk.finish_reason or self.answer_ended:
            self.finish(chunk.finish_reason, now)
            return True
        return False

    def finish(self, reason: FinishReason, now: float) -> None:
        """Note that the answer is complete."""
        if self._answer_ends_at is not None:
            self.output_tokens, reason = self._answer_ends_at, "stop"
        self.finish_reason = reason
        self.ended = now
        self.to(State.FINISHED, now)

    def stats(self) -> dict[str, Any]:
        """Return the public ``stats`` of the last response; times in milliseconds."""

        def ms(since: float, until: float) -> float:
            return round((until - since) * 1e3, 3)

        transfer = self.transfer or NO_TRANSFER
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "attempts": self.attempts,
            "scenario": self.scenario,
            "group": self.group,
            "prefill": self.prefill,
            "decode": self.decode,
            "ms": {
                "forward": ms(self.arrived, self.forwarded),
                "prefill": round(self.prefill_ms, 3),
                "transfer": round(transfer.ms, 3),
                "exposed": round(transfer.exposed_ms, 3),
                "ttft": ms(self.arrived, self.first_token),
                "e2e": ms(self.arrived, self.ended),
            },
            "kv": {
                "bytes": transfer.nbytes,
                "transport": transfer.transport,
                "strategy": transfer.strategy,
                "expected_ms": round(transfer.expected_ms, 3),
            },
        }


@dataclass(slots=True, frozen=True)
class Chunk:
    """New tokens of an answer; the last chunk carries the finish reason."""

    ids: Sequence[int]
    finish_reason: FinishReason = ""
