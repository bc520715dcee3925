"""The emulated engine: real admission, handles and KV bytes, with waiting in place of compute.

The waits are read from a timing profile (YAML); with ``speed: 0`` there are none. Every row of a KV
cache is filled with its token's id, layer by layer over the time of a prefill, and the decode
checks it on arrival, so that a wrong transfer is an error and does not go unnoticed. The tokens are
a fixed function of the prompt and the position, so that an answer is known in advance.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from pdserve import errors
from pdserve.config import documents
from pdserve.engines.protocol import DecodeSequence, PrefillJob, Tokens
from pdserve.kvcache.layout import KVLayout
from pdserve.transfer.arrays import aligned
from pdserve.transfer.scatter import part_of

Milliseconds = Annotated[float, Meta(ge=0)]


class PrefillTiming(Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of n uncached tokens: base + per_token * n + per_token_squared * n^2."""

    base_ms: Milliseconds = 0.0
    per_token_ms: Milliseconds = 0.0
    per_token_squared_ms: Milliseconds = 0.0

    def tokens_ms(self, tokens: int) -> float:
        """Return the milliseconds for a prompt's uncached tokens, without the base."""
        return self.per_token_ms * tokens + self.per_token_squared_ms * tokens**2


class DecodeTiming(Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of a step: base + per_sequence * batch + per_context_token * (its tokens)."""

    base_ms: Milliseconds = 0.0
    per_sequence_ms: Milliseconds = 0.0
    per_context_token_ms: Milliseconds = 0.0


class Profile(Struct, frozen=True, forbid_unknown_fields=True):
    """A timing profile: the shape of the emulated model, and its times."""

    speed: Annotated[float, Meta(ge=0)] = 1.0
    """Divisor of every wait; 0: there are no waits."""
    layers: Annotated[int, Meta(ge=1)] = 1
    kv_heads: Annotated[int, Meta(ge=1)] = 1
    head_dim: Annotated[int, Meta(ge=2, multiple_of=2)] = 16
    context_length: Annotated[int, Meta(ge=2)] = 8192
    prefill: PrefillTiming = PrefillTiming()
    decode: DecodeTiming = DecodeTiming()


class EmulatedModel:
    """A profile, with the vocabulary of the model directory whose tokenizer is used.

    Raises:
        DeploymentError: the profile or the model's config.json cannot be read.
    """

    def __init__(self, model: str, profile: str | None) -> None:
        try:
            self.profile = (
                documents.decode(Path(profile).read_bytes(), Profile)
                if profile
                else Profile(speed=0)
            )
            names = json.loads((Path(model) / "config.json").read_bytes())
            self.vocabulary = int(names["vocab_size"])
        except OSError as error:
            raise errors.DeploymentError(
                f"emulated engine: {error.filename}: {error.strerror}"
            ) from error
        except (ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
            raise errors.DeploymentError(f"emulated engine: {profile or model}: {error}") from error
        self.layout = KVLayout(
            self.profile.layers, self.profile.kv_heads, self.profile.head_dim, "float32"
        )
        self.fingerprint = f"emulated-{zlib.crc32(msgspec.json.encode(self.profile)):08x}"
        self.context_length = self.profile.context_length
        eos = names.get("eos_token_id") or []
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos)

    def token(self, prompt: Tokens, position: int) -> int:
        """Return the token at ``position`` of the output of ``prompt``.

        Never an end-of-text token.
        """
        token = (zlib.crc32(prompt.tobytes()) + 2654435761 * position) % self.vocabulary
        while token in self.eos_ids:
            token = (token + 1) % self.vocabulary
        return token

    def next(self, prompt: Tokens, resumed_tokens: int, new: int) -> int:
        """Return the token after a prompt that ends in ``resumed_tokens``, and ``new`` tokens."""
        return self.token(prompt[: len(prompt) - resumed_tokens], resumed_tokens + new)

    def seconds(self, milliseconds: float) -> float:
        """Return the profile's time in seconds, at its speed."""
        speed = self.profile.speed
        return milliseconds / speed / 1e3 if speed else 0.0


class EmulatedPrefill:
    """Implements ``PrefillEngine``."""

    def __init__(self, model: EmulatedModel) -> None:
        self._model = model

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        timing = self._model.profile.prefill
        milliseconds = timing.base_ms
        for job in jobs:
            job.copy_prefix()
            milliseconds += timing.tokens_ms(len(job.tokens) - job.cached)
        loop = asyncio.get_running_loop()
        layers, began, seconds = (
            self._model.layout.layers,
            loop.time(),
            self._model.seconds(milliseconds),
        )
        for layer in range(layers):
            for job in jobs:
                assert isinstance(job.kv, np.ndarray)
                rows = job.kv[2 * layer : 2 * layer + 2].view("<i4")
                rows[:, job.cached :] = job.tokens[None, job.cached :, None]
            if seconds or layer == layers - 1:
                await asyncio.sleep(began + seconds * (layer + 1) / layers - loop.time())
            for job in jobs:
                job.filled(2 * layer + 2)
        return [self._model.next(job.tokens, job.resumed_tokens, 0) for job in jobs]

    def close(self) -> None:
        """Do nothing: there is nothing to free."""


class EmulatedDecode:
    """Implements ``DecodeEngine``, with a pool of uint8 [layers * 2, rows, row_bytes]."""

    def __init__(self, model: EmulatedModel, blocks: int, block_size: int) -> None:
        self._model = model
        layout = model.layout
        shape = (layout.planes, blocks * block_size, layout.row_bytes)
        self.pool = aligned(shape)
        self._free_at = 0.0
        """Time at which the current step ends (``loop.time()`` seconds)."""

    def joined(self, sequence: DecodeSequence) -> None:
        """Check the KV cache that arrived.

        Raises InstanceError if it is not that of this prompt.
        """
        start = 0
        for first, rows in sequence.rows(len(sequence.prompt)):
            arrived = self.pool[:, first : first + rows].view("<i4")
            if not (arrived == sequence.prompt[None, start : start + rows, None]).all():
                raise errors.InstanceError("the KV cache that arrived is not this prompt's")
            start += rows

    async def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        """Compute a part of a prompt.

        All parts together take as long as the whole takes in a prefill.
        """
        timing, cached = self._model.profile.prefill, sequence.cached
        milliseconds = timing.tokens_ms(end - cached) - timing.tokens_ms(begin - cached)
        if begin == cached:
            milliseconds += timing.base_ms
        seconds = self._model.seconds(milliseconds)
        self._free_at = asyncio.get_running_loop().time() + seconds
        await asyncio.sleep(seconds)
        start = begin
        for first, rows in part_of(sequence.runs, begin, end - begin):
            tokens = sequence.prompt[None, start : start + rows, None]
            self.pool[:, first : first + rows].view("<i4")[:] = tokens
            start += rows
        if end < len(sequence.prompt):
            return None
        self.joined(sequence)
        return self._model.next(sequence.prompt, sequence.resumed_tokens, 0)

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        """Compute a step, which begins when the previous one ended, even if that was a while ago.

        This emulates an engine that launches the next step before it looks at the tokens of the
        last one (overlapped scheduling): the host's work shows only where it takes longer.
        """
        rows = [one.row(one.length - 1) for one in batch]
        self.pool.view("<i4")[:, rows] = np.array([one.tokens[-1] for one in batch])[:, None]
        timing = self._model.profile.decode
        context = sum(sequence.length for sequence in batch)
        seconds = self._model.seconds(
            timing.base_ms
            + timing.per_sequence_ms * len(batch)
            + timing.per_context_token_ms * context
        )
        now = asyncio.get_running_loop().time()
        goes_on = any(len(one.tokens) > 1 for one in batch)
        overlapped = goes_on and now < self._free_at + seconds
        self._free_at = (self._free_at if overlapped else now) + seconds
        await asyncio.sleep(self._free_at - now)
        return [self._model.next(one.prompt, one.resumed_tokens, len(one.tokens)) for one in batch]

    def close(self) -> None:
        """Let go of the pool."""
        self.pool = aligned((0, 0, 0))
