"""A request inside an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tensorrt_llm._fake.exchange import Link

from pdserve.engines.protocol import DecodeSequence, Tokens
from pdserve.kvcache.block_pool import BlockTable
from pdserve.sampling import Sampling

Kind = Literal["context_and_generation", "context_only", "generation_only"]
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of the answer to a request, or its end."""

    tokens: list[int] = field(default_factory=list)
    """The new tokens."""
    reason: Reason | None = None
    """Set in the last answer."""
    error: Exception | None = None
    """If set, this is the last answer, too."""

    @property
    def last(self) -> bool:
        return self.reason is not None or self.error is not None


@dataclass(eq=False)
class Work:
    """A request, and its progress."""

    id: int
    """Unique in its engine, among requests that are open or held."""
    kind: Kind
    prompt: Tokens
    sampling: Sampling
    max_tokens: int
    """Tokens of the whole answer; the first token of a generation request counts."""
    send: Callable[[Answer], object] = lambda _: None
    """Called in the engine's loop."""
    end_id: int | None = None
    stop_words: Sequence[Sequence[int]] = ()
    interval: int | None = None
    """Tokens in an answer; None: all in one answer."""
    link: Link | None = None
    """Set in generation requests, like the next field."""
    first: int | None = None
    aborted: bool = False
    computed: int = 0
    """Prompt tokens computed so far."""
    sent: int = 0
    table: BlockTable | None = None
    sequence: DecodeSequence = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = DecodeSequence(self.prompt, [], [], self.sampling)

    @property
    def room(self) -> int:
        """Return the number of tokens for which it may need KV cache."""
        # A context request ends with its first token, which needs none.
        first = self.kind == "context_only" and self.max_tokens == 1
        return len(self.prompt) + (0 if first else self.max_tokens)

    @property
    def reason(self) -> Reason | None:
        """Return the reason why its last token ends the answer."""
        tokens = self.sequence.tokens
        if tokens[-1] == self.end_id:
            return "stop"
        if any(tokens[-len(word) :] == [*word] for word in self.stop_words if word):
            return "stop"
        return "length" if len(tokens) >= self.max_tokens else None

    def unsent(self) -> list[int]:
        """Return the tokens that have not been sent, and count them as sent."""
        new = self.sequence.tokens[self.sent :]
        self.sent += len(new)
        return new
