"""The interface of engines that transfer KV caches by themselves.

Their *link* is whatever the generation engine needs to find the context engine's KV cache; it is
opaque and passed on unchanged. Every call runs in the instance's event loop, any number at a time.
One that is cancelled is aborted in the engine as soon as no KV cache of it moves, and ends only
then; cancelled again, it ends at once. What it holds in the engine stays taken until it has ended.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, NamedTuple, Protocol

from pdserve.engines.protocol import Tokens
from pdserve.sampling import Sampling

FinishReason = Literal["stop", "length", ""]


class Asked(NamedTuple):
    """A prompt and the parameters of its answer."""

    prompt: Tokens
    sampling: Sampling
    max_tokens: int
    """Maximum number of tokens of the answer, the first one included."""
    ignore_eos: bool
    resumed_tokens: int
    """Number of the prompt's last tokens that are output already; see ``PrefillRequest``."""
    salt: str
    """Only prompts of the same salt may share cached prefixes."""


class Context(NamedTuple):
    """A prompt whose KV cache waits in the engine."""

    token: int
    """First token of the answer."""
    eos: bool
    """True if the token ends an answer."""
    link: bytes
    """Link to the KV cache; empty: the engine keeps none."""
    cached: int
    """Number of the prompt's tokens that the engine had cached; 0 if it does not report them."""


class Piece(NamedTuple):
    """New tokens of an answer."""

    ids: list[int]
    finish_reason: FinishReason


class Report(NamedTuple):
    """An engine's report of its pool of KV blocks."""

    blocks: dict[str, float]
    """Number of blocks by state."""
    events: dict[str, int]
    """Number of changes of the pool since the last report, by type."""


class EngineTerms(Protocol):
    """The common interface of both roles of an engine."""

    @property
    def fingerprint(self) -> str:
        """Return up to 128 characters of ASCII that differ where KV caches cannot be exchanged."""

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and answer together."""

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""

    async def report(self) -> Report:
        """Return the report since the last call; called from time to time."""

    async def close(self) -> None:
        """End the engine, and wait until it has ended."""


class ContextEngine(EngineTerms, Protocol):
    """An engine that computes prompts: it returns first tokens and links."""

    @property
    def keeps_s(self) -> float:
        """Return the seconds after which it frees a KV cache that no decode has taken."""

    async def context(self, asked: Asked, keep: bool) -> Context:
        """Compute a prompt; ``keep`` its KV cache for a decode.

        A call that is cancelled may still return, if the prompt was computed meanwhile.

        Raises:
            InvalidRequest: no such engine can compute the prompt.
            InstanceError: any other failure.
        """


class GenerationEngine(EngineTerms, Protocol):
    """An engine that generates answers from links."""

    def generate(self, asked: Asked, first: int | None, link: bytes) -> AsyncGenerator[Piece, None]:
        """Yield the answer after its first token, to its end.

        Closing the generator aborts the answer.

        Args:
            first: the first token, not to be repeated. None: there is no link, the engine computes
                the prompt itself, and the answer begins with its first token.

        Raises:
            InvalidRequest, InstanceError: as in ``context``; also if the KV cache cannot be
                fetched.
        """


class ExternalEngine(ContextEngine, GenerationEngine, Protocol):
    """An engine of either role."""
