"""Scripted engines that move KV caches themselves, behind real instances and a real scheduler.

A context's KV cache is an entry of a table that all engines share; a generation takes it out.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pdserve import config
from pdserve.engines.external import Asked, Context, Piece, Report
from pdserve.errors import InstanceError
from pdserve.instances.external.decode import ExternalDecode
from pdserve.instances.external.prefill import ExternalPrefill
from pdserve.observability.metrics import Registry
from tests.unit.inprocess import EOS, Model, Site, model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from typing_extensions import Self

KEY = b"k" * 32
KEEPS_S = 2.0
PREFILL_S, STEP_S, TRANSFER_S = 0.05, 0.01, 0.005


@dataclass
class World:
    """The state that the engines of a test share."""

    model: Model
    kept: dict[bytes, asyncio.TimerHandle] = field(default_factory=dict)
    """KV caches that no generation has taken, by link."""
    numbers: Any = field(default_factory=itertools.count)
    computing: int = 0
    most: int = 0
    """The largest number of contexts that were computed at once."""
    decoding: int = 0
    hangs: bool = False
    """No context is ever answered."""
    drains: bool = False
    """A call that is cancelled ends only when it is computed, or its KV cache has moved."""
    context_failures: list[BaseException] = field(default_factory=list)
    generation_failures: list[BaseException] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    async def take(self, seconds: float) -> bool:
        """Wait; tell whether the caller has been cancelled meanwhile, which it survived."""
        task = asyncio.ensure_future(asyncio.sleep(seconds))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not self.drains:
                raise
            await task
            return True
        else:
            return False
        finally:
            task.cancel()

    def token(self, asked: Asked, new: int) -> int:
        return self.model.next(asked.prompt, asked.resumed_tokens, new)


class ScriptedContext:
    keeps_s = KEEPS_S

    def __init__(self, world: World, fingerprint: str) -> None:
        self.world, self.fingerprint = world, fingerprint
        self.context_length = world.model.context_length
        self.vocabulary = world.model.vocabulary
        self.closed = False

    async def context(self, asked: Asked, keep: bool) -> Context:
        world = self.world
        world.asked.append(asked)
        world.computing += 1
        world.most = max(world.most, world.computing)
        try:
            await world.take(1e6 if world.hangs else PREFILL_S)
        finally:
            world.computing -= 1
        if world.context_failures:
            raise world.context_failures.pop()
        token = world.token(asked, 0)
        link = b""
        if keep and not (token == EOS and not asked.ignore_eos):
            link = str(next(world.numbers)).encode()
            timer = asyncio.get_running_loop().call_later(self.keeps_s, world.kept.pop, link)
            world.kept[link] = timer
        return Context(token, token == EOS, link, 0)

    async def report(self) -> Report:
        return Report({"cached": len(self.world.kept)}, {"stored": 1})

    async def close(self) -> None:
        self.closed = True


class ScriptedGeneration:
    def __init__(self, world: World, fingerprint: str) -> None:
        self.world, self.fingerprint = world, fingerprint
        self.context_length = world.model.context_length
        self.vocabulary = world.model.vocabulary
        self.closed = False

    async def generate(
        self, asked: Asked, first: int | None, link: bytes
    ) -> AsyncGenerator[Piece, None]:
        world = self.world
        world.asked.append(asked)
        world.decoding += 1
        try:
            if first is None:
                await asyncio.sleep(PREFILL_S)
            else:
                unwanted = await world.take(TRANSFER_S)
                if link not in world.kept:
                    raise InstanceError(f"no KV cache {link!r}")
                world.kept.pop(link).cancel()
                if unwanted:
                    raise asyncio.CancelledError
                assert first == world.token(asked, 0)
            for position in range(0 if first is None else 1, asked.max_tokens):
                await asyncio.sleep(STEP_S)
                if world.generation_failures:
                    raise world.generation_failures.pop()
                token = world.token(asked, position)
                stop = token == EOS and not asked.ignore_eos
                last = position == asked.max_tokens - 1
                yield Piece([token], "stop" if stop else "length" if last else "")
                if stop:
                    return
        finally:
            world.decoding -= 1

    async def report(self) -> Report:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


@dataclass
class ExternalSite(Site):
    """A scheduler over instances of external engines."""

    linked: bool = False
    fingerprint: Callable[[str], str] = lambda name: "engine:1"
    """The fingerprint of an engine, by its instance's name."""

    async def __aenter__(self) -> Self:
        self.rng = random.Random(self.seed)
        self.model = model(self.folder, **self.profile)
        self.world = World(self.model)
        self.metrics = Registry()
        self.totals = defaultdict(float)
        limits_p = config.Prefill(**{"slots": 4, "batch": 2, "lease_s": KEEPS_S, **self.prefill})
        limits_d = config.Decode(**{"slots": 4, **self.decode})
        p_names = [f"prefill_{i}" for i in range(self.prefills)]
        d_names = [f"decode_{i}" for i in range(self.decodes)]
        self.contexts = [ScriptedContext(self.world, self.fingerprint(name)) for name in p_names]
        self.generations = [
            ScriptedGeneration(self.world, self.fingerprint(name)) for name in d_names
        ]
        self.p: list[Any] = [
            ExternalPrefill(name, engine, limits_p, KEY, self.metrics)
            for name, engine in zip(p_names, self.contexts, strict=True)
        ]
        self.d: list[Any] = [
            ExternalDecode(name, engine, "scripted", limits_d, KEY, self.metrics)
            for name, engine in zip(d_names, self.generations, strict=True)
        ]
        for instance in (*self.p, *self.d):
            instance.start()
        self.limits = limits_p, limits_d
        self.besides = []
        self._assign()
        self._connect()
        return self

    def held(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for role, links in zip(self.instances, (self.p_links, self.d_links), strict=True):
            for instance, link in zip(role, links, strict=True):
                counts[f"{instance.name} open"] = instance.load.open
                counts[f"{instance.name} calls"] = len(link.calls)
        for prefill in self.p:
            counts[f"{prefill._name} held"] = len(prefill._slots.held)
        for decode in self.d:
            counts[f"{decode._name} open requests"] = len(decode._admission.open)
        counts["kept"] = len(self.world.kept)
        counts["computing"] = self.world.computing
        counts["decoding"] = self.world.decoding
        return {what: count for what, count in counts.items() if count}
