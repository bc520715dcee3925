"""The choice of the prompts that a prefill computes together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

from pdserve.engines.protocol import PrefillJob
from pdserve.kvcache.prefix_index import PrefixIndex


class Pending(Protocol):
    """A prompt that waits to be computed."""

    @property
    def job(self) -> PrefillJob: ...

    @property
    def salt(self) -> str:
        """Return what a prompt must have in common with another to reuse its prefix."""


P = TypeVar("P", bound=Pending)
T = TypeVar("T", bound=Hashable)


def next_batch(
    pending: Sequence[P], prefixes: PrefixIndex[T], batch_tokens: int
) -> list[tuple[P, tuple[T, int] | None]]:
    """Return the prompts of the next forward, in the order of ``pending``, which is not empty.

    Prompts with the same first block are not computed together: the second waits for the first,
    and reuses its prefix. A reproducible prompt is computed alone, and without a cached prefix.

    Args:
        batch_tokens: maximum uncached tokens of more than one prompt.

    Returns:
        Each prompt with the holder of its cached prefix and the prefix's length; None: it has none.
    """
    batch: list[tuple[P, tuple[T, int] | None]] = []
    openings: set[tuple[str, bytes]] = set()
    uncached = 0
    block = prefixes.block_tokens
    for prompt in pending:
        job = prompt.job
        alone = job.sampling.reproducible
        found = None if alone else prefixes.find(job.tokens, prompt.salt)
        opening = prompt.salt, job.tokens[:block].tobytes()
        cost = len(job.tokens) - (found[1] if found else 0)
        if batch and (
            alone
            or uncached + cost > batch_tokens
            or (found is None and len(job.tokens) > block and opening in openings)
        ):
            continue
        batch.append((prompt, found))
        openings.add(opening)
        uncached += cost
        if alone:
            break
    return batch
