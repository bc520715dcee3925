"""What the pdserve and the scheduler model share: requests run, cancelled and answered once."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import triton_python_backend_utils as pb_utils

from pdserve import config, errors
from pdserve.config.reloading import DeploymentFile, changes, taken_over
from pdserve.engines import build, checkpoint
from pdserve.engines.protocol import Tokens
from pdserve.gateway import parameters, tracing
from pdserve.gateway.groups import Group, Groups
from pdserve.gateway.router import Asked, Router
from pdserve.gateway.trace_context import Trace
from pdserve.node import failure_notice
from pdserve.observability.metrics import Registry
from pdserve.rpc.channels.bls import BlsChannel
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import Channel
from pdserve.scheduling.request import Request
from pdserve.supervision import Background, repeat
from pdserve.text.stream import TextStream
from pdserve.text.vocabulary import Vocabulary
from pdserve.transfer import key
from pdserve.triton import backend, neutral, stub
from pdserve.triton.backend import ASIDE, LoopThread, Publisher
from pdserve.triton.outbox import Outbox

# So many requests of clients are open at once; more are refused before anything is done for them.
MAX_OPEN = 4096
# How often it is asked of each request whether its client has gone: see ``Outbox``.
CANCEL_LOOK_S = 0.08
BLS_THREADS = 64
# A deployment that has changed is taken over within this time.
RELOAD_LOOK_S = 1.0
# Each waits for the server most of the time.
OUTBOXES = 4
_GONE = errors.Cancelled("the client has gone, or Triton has refused a response to it")


class Prompt(NamedTuple):
    ids: Tokens
    echo: str = ""
    """What comes before the answer: the prompt, if that is asked for."""
    beginning: str = ""
    """The text that the rules of scenarios look at."""


class GatewayModel(ABC):
    """A Triton model in front of the schedulers. Subclasses read prompts and write answers."""

    prompt_input: str
    answers_in_text: bool

    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        self._file = DeploymentFile(backend.deployment_path(args))
        self.deployment = self._file.deployment
        self.vocabulary = self.read(Path(self.deployment.model))
        self._end_ids = checkpoint.known_eos_ids(Path(self.deployment.model))
        self._longest = build.longest(self.deployment)
        """Tokens of prompt and answer together, at most."""
        self._name = args["model_name"]
        self._traces = tracing.start(
            self.deployment.gateway.traces, self._name, pb_utils.Logger.log_warn
        )
        self._inputs = [name for name in backend.inputs(args) if name not in neutral.FIELDS]
        self._unfinished = backend.text("finish_reason", "")
        self._metrics = Registry()
        self._heartbeat = backend.own_heartbeat(args, 1 + OUTBOXES)
        self._outboxes = [
            Outbox(CANCEL_LOOK_S, self._client_gone, self._heartbeat, 1 + number)
            for number in range(OUTBOXES)
        ]
        self._ids = itertools.count()
        self._serving: dict[str, asyncio.Task[Any]] = {}
        self._open = 0
        """Requests of clients that are served, or wait."""
        self._key = key.of(self.deployment)
        self._always = Background()
        # async_exec of BLS keeps a thread of the default pool until the first response.
        bls = self.deployment.gateway.channel == "bls"
        self._loop = LoopThread(self._heartbeat, BLS_THREADS if bls else ASIDE)
        self._loop.run(self._start())

    @abstractmethod
    def read(self, model: Path) -> Vocabulary:
        """Raises: DeploymentError: it has no tokenizer."""

    @abstractmethod
    async def prompt(self, inputs: parameters.Tensors) -> Prompt:
        """Raises: InvalidRequest: there is no such prompt."""

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
        self._traces.close()
        self._heartbeat.close()

    # ------------------------------------------------------------------ serving

    def _accept(self, requests: list[Any]) -> None:
        for request in requests:
            key = str(next(self._ids))
            try:
                self._outbox(key).open(key, request.get_response_sender())
            except Exception as error:  # it cannot be answered; those after it can
                pb_utils.Logger.log_error(f"request not accepted: {error!r}")
                continue
            task = self._serving[key] = asyncio.create_task(self._serve(key, request))
            task.add_done_callback(partial(self._end, key))
        self._count_open()

    async def _serve(self, key: str, request: Any) -> Any:
        """The last response. Raises: whatever has failed."""
        given = backend.parameters(request)
        if (lost := given.get("lost")) is not None:
            return self._lose(str(lost))
        if self._open >= MAX_OPEN:
            name = self._router.default.terms.name
            self._metrics.add("pdserve_requests_total", scenario=name, outcome="rejected")
            raise errors.Unavailable(f"{MAX_OPEN} requests are open here already; try again later")
        self._open += 1
        self._heartbeat.turned(0)  # a burst is one pass of the loop
        self._heartbeat.worked(0)
        try:
            with self._traces.begin(given) as trace:
                return await self._answer(key, request, trace)
        finally:
            self._open -= 1

    def _end(self, key: str, task: asyncio.Task[Any]) -> None:
        """The last response is sent, whatever has happened: the client would wait for ever."""
        del self._serving[key]
        if task.cancelled():
            response = backend.error(_GONE)
        elif (failure := task.exception()) is not None:
            response = backend.failed(failure)
        else:
            response = task.result()
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

    async def _answer(self, key: str, request: Any, trace: Trace) -> Any:
        """Send all responses but the last, which is returned."""
        scenario = self._router.default
        try:
            asked, prompt = await self._read(request)
            about = Asked(asked.scenario, asked.tenant, self._name, prompt.beginning)
            scenario = self._router.scenario(about)
            job = self._request(key, asked, prompt.ids, scenario.terms)
        except (errors.InvalidRequest, errors.NotFound):
            name = scenario.terms.name
            self._metrics.add("pdserve_requests_total", scenario=name, outcome="rejected")
            raise
        job.time_limit_s = (request.timeout() or asked.timeout_us) / 1e6 or math.inf
        group = scenario.next_group()
        self._metrics.add("pdserve_routed_total", scenario=job.scenario, group=group.name)
        trace.carry(job)
        text = TextStream(self.vocabulary, asked.stop)
        reads_text = self.answers_in_text or bool(asked.stop)
        piece, ids, told = prompt.echo, list[int](), 0
        with group.serving(job) as scheduler:
            async with aclosing(scheduler.run(job)) as chunks:
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
        if _within_limits(job, scenario.terms):
            self._metrics.add("pdserve_good_requests_total", scenario=job.scenario)
        if reads_text and not text.stopped:
            piece += text.finish()
        ending = [
            *self.outputs(piece, ids[: job.output_tokens - told]),
            backend.text("finish_reason", job.finish_reason),
            backend.text("stats", msgspec.json.encode(job.stats()).decode()),
        ]
        return pb_utils.InferenceResponse(ending)

    async def _read(self, request: Any) -> tuple[parameters.Parameters, Prompt]:
        """Raises: InvalidRequest: it can never be served."""
        inputs = backend.tensors(request)
        if self.prompt_input not in inputs:  # Triton counts the inputs, but does not look
            raise errors.InvalidRequest(f"{self.prompt_input} is missing; every request needs it")
        most = self.deployment.gateway.max_stop_words
        asked = parameters.parse(inputs, backend.parameters(request), most, self._inputs)
        neutral.check(inputs, self._end_ids, self.vocabulary.size)
        return asked, await self.prompt(inputs)

    def _request(
        self, key: str, asked: parameters.Parameters, prompt: Tokens, terms: config.Scenario
    ) -> Request:
        """What the client asks for; where it says nothing, what its scenario says.

        Raises:
            InvalidRequest: prompt or answer are too long.
        """
        limits = self.deployment.gateway
        most = limits.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise errors.InvalidRequest(
                f"the prompt has {len(prompt)} tokens; at most {most} are allowed"
            )
        ttft_limit_ms = asked.ttft_limit_ms or terms.ttft_limit_ms or limits.ttft_limit_ms
        return Request(
            id=key,
            prompt=prompt.astype("<i4").tobytes(),
            max_tokens=parameters.answer_length(
                asked.max_tokens, terms.max_tokens, len(prompt), self._longest
            ),
            sampling=parameters.sampling(asked.sampling, msgspec.structs.asdict(terms.sampling)),
            stream=asked.stream or bool(asked.stop),
            ignore_eos=asked.ignore_eos,
            tenant="" if terms.shared_prefixes else asked.tenant,
            scenario=terms.name,
            priority=terms.priority if asked.priority is None else asked.priority,
            ttft_limit_s=ttft_limit_ms / 1e3,
        )

    # -------------------------------------------------------- beginning and end

    async def _start(self) -> None:
        rng = random.Random(secrets.randbits(128))
        self._groups = Groups(self._name, self._channel, self._metrics, rng)
        self._take(self.deployment)
        self._always.start(
            Publisher(self._metrics).run(), repeat("the look at the deployment", self._reload)
        )

    def _take(self, deployment: config.Deployment) -> None:
        """Serve by this deployment from now on."""
        groups = self._groups.take(deployment)
        self.deployment = deployment
        self._router: Router[Group] = Router(
            deployment.served,
            groups,
            deployment.gateway.default_scenario,
            deployment.gateway.strict,
            self._metrics,
        )

    async def _reload(self) -> float:
        """Take over the deployment if its file has changed; the seconds until the next look."""
        loop = asyncio.get_running_loop()
        await self._groups.sweep()
        try:
            if not await loop.run_in_executor(None, self._file.changed):
                return RELOAD_LOOK_S
        except errors.DeploymentError as error:
            self._log(pb_utils.Logger.log_error, "refused, the old one stays", str(error))
            self._metrics.add("pdserve_reloads_total", gateway=self._name, outcome="refused")
            return RELOAD_LOOK_S
        wanted = self._file.deployment
        able = taken_over(self.deployment, wanted)
        self._log(pb_utils.Logger.log_info, "taken over", *changes(self.deployment, able))
        self._log(pb_utils.Logger.log_warn, "waits for a restart", *changes(able, wanted))
        self._take(able)
        self._metrics.add("pdserve_reloads_total", gateway=self._name, outcome="taken")
        return RELOAD_LOOK_S

    def _log(self, log: Callable[[str], None], what: str, *lines: str) -> None:
        if lines:
            log(f"{self._name}: deployment: {what}: {'; '.join(lines)}")

    def _channel(self, name: str, server: config.Server) -> Channel:
        if self.deployment.gateway.channel == "bls":
            return BlsChannel(pb_utils, name, self._key, BLS_THREADS)
        return GrpcChannel(f"{server.host}:{server.grpc_port}", name, self._key)

    def _lose(self, lost: str) -> Any:
        """A watchdog says that an instance's process is gone; of none, it asks whether we live.

        Raises:
            InvalidRequest: it is not a watchdog that says so.
        """
        told = failure_notice.decode(lost, self._key)
        self._groups.lose(told.instance, told.epoch)
        return pb_utils.InferenceResponse([self._unfinished])

    async def _close(self) -> None:
        await self._always.close()
        tasks = list(self._serving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._groups.close()


def _within_limits(job: Request, terms: config.Scenario) -> bool:
    """Whether an answer came as its scenario promises; its first token has, or it had none."""
    limit = terms.tpot_limit_ms
    steps = max(job.output_tokens - 1, 1)
    return limit is None or (job.ended - job.first_token) * 1e3 <= limit * steps
