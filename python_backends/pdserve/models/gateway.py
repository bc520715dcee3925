"""What the pdserve and the scheduler model share: requests run, cancelled and answered once."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import triton_python_backend_utils as pb_utils

from pdserve import config, errors, parameters
from pdserve.channels.bls import BlsChannel
from pdserve.channels.grpc import GrpcChannel
from pdserve.channels.protocol import Channel
from pdserve.engines import build
from pdserve.engines.protocol import Tokens
from pdserve.metrics import Registry
from pdserve.models import triton
from pdserve.models.triton import LoopThread, Outbox, Publisher
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.meetings import Meetings
from pdserve.scheduling.request import Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.text import TextStream
from pdserve.tokenizer import Tokenizer

# A client that has gone is noticed within this time.
CANCEL_LOOK_S = 0.08
BLS_THREADS = 64
# Each waits for the server most of the time.
OUTBOXES = 4
_GONE = errors.Cancelled("the client has gone")


class GatewayModel(ABC):
    """A Triton model in front of a scheduler. Subclasses read prompts and write answers."""

    prompt_input: str
    answers_in_text: bool

    def initialize(self, args: dict[str, str]) -> None:
        self.deployment = triton.deployment(args)
        self.tokenizer = Tokenizer(Path(self.deployment.model))
        decode = self.deployment.decode
        self._longest = min(
            build.context_length(self.deployment), decode.blocks * decode.block_size
        )
        """Tokens of prompt and answer together, at most."""
        self._name = args["model_name"]
        self._unfinished = triton.text("finish_reason", "")
        self._metrics = Registry()
        self._outboxes = [Outbox(CANCEL_LOOK_S, self._client_gone) for _ in range(OUTBOXES)]
        self._ids = itertools.count()
        self._serving: dict[str, asyncio.Task[Any]] = {}
        self._loop = LoopThread()
        self._loop.run(self._start())

    @abstractmethod
    async def prompt(self, inputs: parameters.Tensors) -> tuple[Tokens, str]:
        """The prompt's token ids, and what is echoed before the answer if that is asked for.

        Raises:
            InvalidRequest: there is no such prompt.
        """

    @abstractmethod
    def outputs(self, text: str, ids: list[int]) -> list[Any]:
        """The tensors of one response."""

    def execute(self, requests: list[Any]) -> None:
        """Begin to serve each request; nothing here waits."""
        self._loop.call(self._accept, requests)

    def finalize(self) -> None:
        self._loop.run(self._close())
        for outbox in self._outboxes:
            outbox.close()
        self._loop.close()

    # ------------------------------------------------------------------ serving

    def _accept(self, requests: list[Any]) -> None:
        for request in requests:
            key = str(next(self._ids))
            self._outbox(key).open(key, request.get_response_sender())
            task = self._serving[key] = asyncio.create_task(self._serve(key, request))
            task.add_done_callback(partial(self._end, key))
        self._count_open()

    async def _serve(self, key: str, request: Any) -> Any:
        """The last response, whatever happens: without it Triton would leave the client waiting."""
        try:
            return await self._answer(key, request)
        except errors.PDServeError as error:
            known = error.code != errors.PDServeError.code
            return triton.error(error if known else _logged(error))
        except Exception as error:
            return triton.error(_logged(error))

    def _end(self, key: str, task: asyncio.Task[Any]) -> None:
        del self._serving[key]
        response = triton.error(_GONE) if task.cancelled() else task.result()
        self._outbox(key).send(key, response, last=True)
        self._count_open()

    def _outbox(self, key: str) -> Outbox:
        return self._outboxes[int(key) % OUTBOXES]

    def _count_open(self) -> None:
        self._metrics.set("pdserve_open_requests", len(self._serving), gateway=self._name)

    def _client_gone(self, key: str) -> None:
        self._loop.call(self._abandon, key)

    def _abandon(self, key: str) -> None:
        if task := self._serving.get(key):
            task.cancel()

    async def _answer(self, key: str, request: Any) -> Any:
        """Send all responses but the last, which is returned."""
        try:
            job, asked, piece = await self._read(key, request)
        except errors.InvalidRequest:
            self._metrics.add("pdserve_requests_total", scenario="default", outcome="rejected")
            raise
        text = TextStream(self.tokenizer, asked.stop)
        reads_text = self.answers_in_text or bool(asked.stop)
        ids, told = list[int](), 0
        async with aclosing(self._scheduler.run(job)) as chunks:
            async for chunk in chunks:
                ids += chunk.ids
                if reads_text:
                    piece += text.push(chunk.ids)
                    if text.stopped:
                        job.end_answer(text.tokens_used)
                last = chunk.finish_reason or job.answer_ended
                if asked.stream and not last and (piece or not self.answers_in_text):
                    outputs = [*self.outputs(piece, ids), self._unfinished]
                    self._outbox(key).send(key, pb_utils.InferenceResponse(outputs), last=False)
                    told += len(ids)
                    piece, ids = "", []
        if reads_text and not text.stopped:
            piece += text.finish()
        ending = [
            *self.outputs(piece, ids[: job.output_tokens - told]),
            triton.text("finish_reason", job.finish_reason),
            triton.text("stats", msgspec.json.encode(job.stats()).decode()),
        ]
        return pb_utils.InferenceResponse(ending)

    async def _read(self, key: str, request: Any) -> tuple[Request, parameters.Parameters, str]:
        """What is asked for, checked, and the text to echo before the answer.

        Raises:
            InvalidRequest: it can never be served.
        """
        inputs = triton.tensors(request)
        if self.prompt_input not in inputs:  # Triton counts the inputs, but does not look
            raise errors.InvalidRequest(f"{self.prompt_input} is missing; every request needs it")
        most = self.deployment.gateway.max_stop_words
        asked = parameters.parse(inputs, triton.parameters(request), most)
        prompt, echo = await self.prompt(inputs)
        return self._request(key, asked, prompt), asked, echo

    def _request(self, key: str, asked: parameters.Parameters, prompt: Tokens) -> Request:
        limits = self.deployment.gateway
        most = limits.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise errors.InvalidRequest(
                f"the prompt has {len(prompt)} tokens; at most {most} are allowed"
            )
        return Request(
            id=key,
            prompt=prompt.astype("<i4").tobytes(),
            max_tokens=parameters.answer_length(asked.max_tokens, len(prompt), self._longest),
            sampling=asked.sampling,
            stream=asked.stream or bool(asked.stop),
            ignore_eos=asked.ignore_eos,
            tenant=asked.tenant,
            priority=asked.priority,
            ttft_limit_s=(asked.ttft_limit_ms or limits.ttft_limit_ms) / 1e3,
        )

    # -------------------------------------------------------- beginning and end

    async def _start(self) -> None:
        limits = self.deployment.gateway
        loop = asyncio.get_running_loop()
        if limits.channel == "bls":
            # async_exec keeps a thread of the default pool until the first response.
            loop.set_default_executor(ThreadPoolExecutor(BLS_THREADS))
        prefills = self._reach(self.deployment.instances("prefill"))
        decodes = self._reach(self.deployment.instances("decode"))
        self._instances = [*prefills, *decodes]
        strategy = self.deployment.transfer.strategy
        layered = None if strategy == "auto" else strategy == "layered"
        meetings = Meetings(prefills, decodes, layered, self._name, self._metrics)
        self._scheduler = Scheduler(
            prefills,
            decodes,
            meetings,
            self._metrics,
            stall_s=limits.stall_s,
            lease_s=self.deployment.prefill.lease_s,
            rng=random.Random(secrets.randbits(128)),
        )
        self._always = [
            loop.create_task(Publisher(self._metrics).run()),
            loop.create_task(meetings.run()),
        ]

    def _reach(self, instances: dict[str, config.Server]) -> list[Instance]:
        return [Instance(name, self._channel(name, server)) for name, server in instances.items()]

    def _channel(self, name: str, server: config.Server) -> Channel:
        if self.deployment.gateway.channel == "bls":
            return BlsChannel(pb_utils, name, BLS_THREADS)
        return GrpcChannel(f"{server.host}:{server.grpc_port}", name)

    async def _close(self) -> None:
        tasks = (*self._serving.values(), *self._always)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for instance in self._instances:
            await instance.close()


def _logged(error: Exception) -> errors.PDServeError:
    """An internal error as the client sees it: with an id that is in the log."""
    number = secrets.token_hex(4)
    pb_utils.Logger.log_error(f"error {number}: {error!r}")
    return errors.PDServeError(f"{error} (error {number} in the server's log)")
