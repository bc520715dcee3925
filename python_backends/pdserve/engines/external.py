"""What an engine does that moves KV caches by itself.

Its *link* is whatever the generation needs to find the context's KV cache: opaque, passed on as it
is. Every call runs in the instance's event loop, any number at a time; one that is cancelled is
aborted in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, NamedTuple, Protocol

from pdserve.engines.protocol import Tokens
from pdserve.sampling import Sampling

FinishReason = Literal["stop", "length", ""]


class Asked(NamedTuple):
    """A prompt and what is wanted of it."""

    prompt: Tokens
    sampling: Sampling
    max_tokens: int
    """Tokens of the answer, the first one included."""
    ignore_eos: bool
    resumed_tokens: int
    """Of the prompt's last tokens, how many are output already; see ``PrefillRequest``."""


class Context(NamedTuple):
    """A prompt whose KV cache waits in the engine."""

    token: int
    """The first of the answer."""
    eos: bool
    """It is one that ends an answer."""
    link: bytes
    """Empty: the engine keeps nothing."""
    cached: int
    """Tokens of the prompt that the engine had; 0 where it does not say."""


class Piece(NamedTuple):
    """New tokens of an answer."""

    ids: list[int]
    finish_reason: FinishReason


class Report(NamedTuple):
    """What an engine tells of its pool of KV blocks."""

    blocks: dict[str, float]
    """By state."""
    events: dict[str, int]
    """Changes of the pool since the last report, by type."""


class EngineTerms(Protocol):
    """What both roles of an engine have."""

    @property
    def fingerprint(self) -> str:
        """Differs where KV caches cannot be exchanged: printable ASCII, at most 128 characters."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, at most."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""

    async def report(self) -> Report:
        """What it says of its memory since it was asked last; called from time to time."""

    async def close(self) -> None:
        """End it, and wait until it has ended."""


class ContextEngine(EngineTerms, Protocol):
    """Prompts in, first tokens and links out."""

    @property
    def keeps_s(self) -> float:
        """Seconds after which it lets go of a KV cache that nobody has taken."""

    async def context(self, asked: Asked, keep: bool) -> Context:
        """Compute a prompt; ``keep`` its KV cache for a decode.

        Raises:
            InvalidRequest: it cannot be computed by any such engine.
            InstanceError: anything else.
        """


class GenerationEngine(EngineTerms, Protocol):
    """Links in, tokens out."""

    def generate(self, asked: Asked, first: int | None, link: bytes) -> AsyncGenerator[Piece, None]:
        """The answer after its first token, to its end; closing the generator aborts it.

        Args:
            first: the first token, not to be repeated. None: there is no link, the engine computes
                the prompt itself, and the answer begins with its first token.

        Raises:
            InvalidRequest, InstanceError: as ``context``; also when the KV cache cannot be had.
        """
