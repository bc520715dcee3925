"""The common part of the models pdserve and scheduler: requests, cancellation, answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from pdserve import config, errors
from pdserve.config.reloading import DeploymentFile, changes, taken_over
from pdserve.control.assignment import ANY
from pdserve.engines import build, checkpoint
from pdserve.gateway import parameters, tracing
from pdserve.gateway.desired import Desired
from pdserve.gateway.parameters import Parameters
from pdserve.gateway.service import Part, Prompt, Service
from pdserve.gateway.trace_context import Trace
from pdserve.node import failure_notice
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.observability.publisher import Publisher
from pdserve.rpc.channels.bls import BlsChannel
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import Channel
from pdserve.scheduling.scheduler import Scheduler
from pdserve.supervision import Background, repeat
from pdserve.text.vocabulary import Vocabulary
from pdserve.transfer import key
from pdserve.triton import backend, neutral, stub
from pdserve.triton.backend import ASIDE, LoopThread
from pdserve.triton.outbox import Outbox
from pdserve.triton.readiness import Readiness

# Interval of checks, for each request, whether its client has gone: see ``Outbox``.
CANCEL_LOOK_S = 0.08
BLS_THREADS = 64
# Interval of checks whether the deployment has changed.
RELOAD_LOOK_S = 1.0
# Number of outboxes, each of which waits for the server most of the time.
OUTBOXES = 4
_GONE = errors.Cancelled("the client has gone")


class GatewayModel(ABC):
    """A Triton model in front of the schedulers. Subclasses read prompts and write answers."""

    prompt_input: str
    scheduler: type[Scheduler] = Scheduler
    """Class of the scheduler of a group."""
    _readiness: Readiness | None = None

    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        self._file = DeploymentFile(backend.deployment_path(args))
        self._run = backend.folder(args).resolve().parent
        self.deployment = self._file.deployment
        self.vocabulary = self.read(Path(self.deployment.model))
        self._end_ids = checkpoint.known_eos_ids(Path(self.deployment.model))
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
        self._key = key.of(self.deployment)
        self._always = Background()
        # async_exec of BLS occupies a thread of the default pool until the first response.
        bls = self.deployment.gateway.channel == "bls"
        self._loop = LoopThread(self._heartbeat, BLS_THREADS if bls else ASIDE)
        self._loop.run(self._start())
        self._readiness = Readiness(self._name, self._heartbeat)
        self._heartbeat.loaded()

    def is_ready(self) -> bool:
        """Tell whether it can be used; see ``readiness``."""
        return self._readiness is not None and self._readiness()

    @abstractmethod
    def read(self, model: Path) -> Vocabulary:
        """Read the model's vocabulary. Raises DeploymentError if it has no tokenizer."""

    @abstractmethod
    async def prompt(self, inputs: parameters.Tensors) -> Prompt:
        """Return a request's prompt. Raises InvalidRequest if it has none."""

    @abstractmethod
    def outputs(self, part: Part) -> list[Any]:
        """Return the tensors of one response, without ``finish_reason`` and ``stats``."""

    def allowed(self, inputs: parameters.Tensors) -> list[str]:
        """Return the names that the error of an unknown field has, of a request with ``inputs``."""
        return self._inputs

    def execute(self, requests: list[Any]) -> None:
        """Begin to serve each request, without waiting."""
        self._loop.call(self._accept, requests)

    def finalize(self) -> None:
        self._readiness = None
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

    async def _serve(self, key: str, request: Any) -> Any:
        """Serve a request, and return the last response. Raises whatever has failed."""
        given = backend.parameters(request)
        if (notice := given.get("failure_notice")) is not None:
            return await self._noticed(str(notice))
        with self._service.admitted():
            self._heartbeat.turned(0)  # a burst is one pass of the loop
            self._heartbeat.worked(0)
            with self._traces.begin(given) as trace:
                return await self._answer(key, request, trace)

    def _end(self, key: str, task: asyncio.Task[Any]) -> None:
        """Send the last response, whatever has happened, since the client would wait for ever."""
        del self._serving[key]
        if task.cancelled():
            response = backend.error(_GONE)
        elif (failure := task.exception()) is not None:
            response = backend.failed(failure)
        else:
            response = task.result()
        self._outbox(key).send(key, response, last=True)

    def _outbox(self, key: str) -> Outbox:
        return self._outboxes[int(key) % OUTBOXES]

    def _client_gone(self, key: str) -> None:
        self._loop.call(self._abandon, key)

    def _abandon(self, key: str) -> None:
        if task := self._serving.get(key):
            task.cancel()

    async def _answer(self, key: str, request: Any, trace: Trace) -> Any:
        """Send all responses but the last, which is returned."""
        read = partial(self._read, request)
        answer = self._service.answer(key, read, trace)
        async with aclosing(answer) as parts:
            async for part in parts:
                outputs = self.outputs(part)
                if part.finish_reason:
                    reason = backend.text("finish_reason", part.finish_reason)
                    stats = backend.text("stats", part.stats)
                    return pb_utils.InferenceResponse([*outputs, reason, stats])
                response = pb_utils.InferenceResponse([*outputs, self._unfinished])
                self._outbox(key).send(key, response, last=False)
        raise AssertionError("an answer without an end")

    async def _read(self, request: Any) -> tuple[Parameters, Prompt]:
        """Read parameters and prompt. Raises InvalidRequest if the request can never be served."""
        inputs = backend.tensors(request)
        parameters.needed(inputs, self.prompt_input)
        most = self.deployment.gateway.max_stop_words
        given = backend.parameters(request)
        asked = parameters.parse(inputs, given, most, self.allowed(inputs))
        neutral.check(inputs, self._end_ids, self.vocabulary.size)
        if own := request.timeout():
            asked = replace(asked, timeout_us=own)
        return asked, await self.prompt(inputs)

    # -------------------------------------------------------- beginning and end

    async def _start(self) -> None:
        self._service = Service(
            self._name,
            self.deployment,
            self.vocabulary,
            build.longest(self.deployment),
            self._channel,
            self._metrics,
            random.Random(secrets.randbits(128)),
            self.scheduler,
        )
        self._publisher = Publisher(self._metrics, pb_utils.MetricFamily, self._service.show)
        self._always.start(
            self._publisher.run(),
            repeat("the look at the deployment", self._reload),
            self._service.assignments.follow(),
        )
        if (control := self.deployment.control) is not None:
            take = self._service.assignments.desired
            self._always.start(Desired(control, self._run, self._key, take).run())

    async def _reload(self) -> float:
        """Apply the deployment if its file has changed; return the seconds until the next check."""
        loop = asyncio.get_running_loop()
        await self._service.sweep()
        try:
            if not await loop.run_in_executor(None, self._file.changed):
                return RELOAD_LOOK_S
        except errors.DeploymentError as error:
            self._log(pb_utils.Logger.log_error, "refused, the old one stays", str(error))
            self._metrics.add(catalogue.RELOADS, 1, gateway=self._name, outcome="refused")
            return RELOAD_LOOK_S
        wanted = self._file.deployment
        able = taken_over(self.deployment, wanted)
        self._log(pb_utils.Logger.log_info, "taken over", *changes(self.deployment, able))
        self._log(pb_utils.Logger.log_warn, "waits for a restart", *changes(able, wanted))
        self.deployment = able
        self._service.take(able)
        self._metrics.add(catalogue.RELOADS, 1, gateway=self._name, outcome="applied")
        return RELOAD_LOOK_S

    def _log(self, log: Callable[[str], None], what: str, *lines: str) -> None:
        if lines:
            log(f"{self._name}: deployment: {what}: {'; '.join(lines)}")

    def _channel(self, name: str, server: config.Server, number: int) -> Channel:
        if self.deployment.gateway.channel == "bls":
            threads = 1 if number == ANY else BLS_THREADS
            return BlsChannel(pb_utils, name, self._key, threads, number)
        return GrpcChannel(f"{server.host}:{server.grpc_port}", name, self._key, number)

    async def _noticed(self, notice: str) -> Any:
        """Handle a notice of a process that is gone, a question, or a check of this gateway.

        Raises:
            InvalidRequest: the notice is not from this deployment.
        """
        told = failure_notice.decode(notice, self._key)
        if failure_notice.is_question(told):
            answers = await self._service.reaches(told.instance)
            return pb_utils.InferenceResponse(
                [backend.text("finish_reason", "stop")] if answers else [self._unfinished]
            )
        self._service.lose(told.instance, told.epoch)
        return pb_utils.InferenceResponse([self._unfinished])

    async def _close(self) -> None:
        await self._always.close()
        tasks = list(self._serving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._service.close()
        await self._publisher.close()
