"""A gateway, a prefill and a decode in this process, joined by channels in memory.

They are made from a deployment like Triton's models make them, with the emulated engine and shared
memory. Only Triton is left out: its models, and the channels between its servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from pdserve import config
from pdserve.control.assignment import FIRST, Assignment
from pdserve.engines import build
from pdserve.gateway.parameters import Parameters
from pdserve.gateway.service import Part, Prompt, Service
from pdserve.gateway.trace_context import Trace
from pdserve.instances.assigned import Assigned
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.node import epoch
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.server import Answers, Call
from pdserve.text.vocabulary import Vocabulary
from pdserve.transfer import plane

TOKENS = 128
"""Number of tokens of a prompt."""
MAX_TOKENS = 4
VOCABULARY = 32_000
_ASKED = Parameters(
    max_tokens=MAX_TOKENS,
    sampling={},
    stop=(),
    stream=True,
    ignore_eos=True,
    scenario="",
    tenant="",
    priority=None,
    ttft_limit_ms=None,
    timeout_us=0,
)


class MemoryChannel:
    """A channel to an instance in the same event loop; its messages are encoded as on the wire."""

    def __init__(self, instance: Assigned, number: int) -> None:
        self._instance = instance
        self._number = number
        self._calls = Calls()
        self._answers = Answers(self._send)

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = self._calls.open(call)
        asyncio.get_running_loop().call_soon(self._arrive, call, messages.encode(request))
        return replies

    def _arrive(self, call: str, data: bytes) -> None:
        opened = Call(call, f"memory/{call}")
        self._answers.open(opened)
        send = partial(self._answers.reply, opened)
        self._instance.handle(self._number, messages.decode_request(data), opened.stream, send)

    def _send(self, call: str, data: bytes | None, _last: bool) -> None:
        if data is not None:
            asyncio.get_running_loop().call_soon(self._calls.deliver, call, data)

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    def lose(self, _epoch: bytes) -> None:
        """Do nothing: no process is lost."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class Site:
    """A deployment of one prefill and one decode; used in one event loop.

    Args:
        folder: empty folder, in which the model's configuration and the key are written.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
        server = config.Server(name="memory", prefill=("prefill_0",), decode=("decode_0",))
        deployment = config.Deployment(
            model=str(folder),
            servers=(server,),
            engine=config.Engine(kind="emulated"),
            prefill=config.Prefill(arena_mib=4),
            decode=config.Decode(blocks=256),
            transfer=config.Transfer(key_file=str(folder / "key")),
        )
        metrics = Registry()
        self._instances: dict[str, PrefillInstance | DecodeInstance] = {
            "prefill_0": _prefill(deployment, metrics),
            "decode_0": _decode(deployment, metrics),
        }
        own = epoch.of(os.getpid())
        self._assigned = {
            name: Assigned(name, one.role, Assignment(FIRST, one.role), one, own, _keep)
            for name, one in self._instances.items()
        }
        for instance in self._instances.values():
            instance.start()
        self._rng = random.Random(1)
        self._service = Service(
            "scheduler",
            deployment,
            Vocabulary(tokenizers.Tokenizer(tokenizers.models.BPE())),
            build.longest(deployment),
            self._channel,
            metrics,
            self._rng,
        )

    def _channel(self, name: str, _server: config.Server, number: int) -> MemoryChannel:
        return MemoryChannel(self._assigned[name], number)

    def ask(self, request_id: str) -> AsyncGenerator[Part, None]:
        """Answer a prompt that shares no prefix with others."""
        ids = [self._rng.randrange(VOCABULARY) for _ in range(TOKENS)]
        prompt = Prompt(np.array(ids, np.int32))

        async def read() -> tuple[Parameters, Prompt]:
            return _ASKED, prompt

        return self._service.answer(request_id, read, Trace(""))

    async def close(self) -> None:
        await self._service.close()
        for instance in self._instances.values():
            await instance.close()


def _keep(_: Assignment) -> None:
    """Do nothing: no assignment follows the first."""


def _prefill(deployment: config.Deployment, metrics: Registry) -> PrefillInstance:
    limits, model = deployment.prefill, build.model(deployment)
    terms = plane.terms(deployment, model.fingerprint, model.layout)
    holder = plane.holder(deployment, "prefill_0", terms, limits.slots + MAX_QUARANTINED)
    return PrefillInstance("prefill_0", model, build.prefill(model), limits, holder, metrics)


def _decode(deployment: config.Deployment, metrics: Registry) -> DecodeInstance:
    model = build.model(deployment)
    engine = build.decode(model, deployment.decode)
    terms = plane.terms(deployment, model.fingerprint, model.layout)
    return DecodeInstance(
        "decode_0",
        model,
        engine,
        deployment.decode,
        plane.receiver(deployment, terms, engine.pool),
        deployment.transfer.pulls,
        deployment.prefill.batch_tokens,
        metrics,
    )
