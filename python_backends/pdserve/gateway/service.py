"""A request from its arrival to its answer, independent of the server around it."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdserve import config, errors
from pdserve.gateway import parameters
from pdserve.gateway.assignments import Assignments
from pdserve.gateway.groups import Group, Groups, OpenChannel
from pdserve.gateway.parameters import Parameters
from pdserve.gateway.router import Asked, Router
from pdserve.gateway.trace_context import Trace
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.scheduling.outcome import final_state
from pdserve.scheduling.request import Request, State
from pdserve.scheduling.scheduler import Scheduler
from pdserve.text.excerpts import Excerpt, Excerpts
from pdserve.text.stream import TextStream
from pdserve.text.vocabulary import Vocabulary

Tokens = NDArray[np.int32]
MAX_OPEN = 4096
"""Number of clients' requests that are open at once; more are refused before any work is done."""


class Prompt(NamedTuple):
    """A prompt as token ids, with its text where needed."""

    ids: Tokens
    echo: str = ""
    """Text that is sent before the answer: the prompt, if the client asks for it."""
    beginning: str = ""
    """Beginning of the text, which the rules of scenarios match."""
    in_text: bool = False
    """True if a part is sent only when it has text; otherwise, when it has tokens."""
    model: str = ""
    """Triton model that the client called, if it is not the gateway's own."""


class Part(NamedTuple):
    """A part of an answer: what has come since the previous part."""

    text: str
    ids: list[int]
    finish_reason: str = ""
    """``stop`` or ``length`` in the last part; empty in the others."""
    stats: str = ""
    """The request's statistics as JSON, in the last part; empty in the others."""
    excerpt: Excerpt | None = None
    """The ids by which this part can be decoded alone, if the prompt is ``in_text``."""


class Service:
    """Serves requests over the scenarios and groups of a deployment; used in one event loop.

    Args:
        name: name of the gateway, used in metrics and by the rules of scenarios.
        longest: maximum number of tokens of prompt and answer together.
        connect: opens a channel to an instance of a server.
        rng: source of jitter.
        scheduler: makes the scheduler of a group.
    """

    def __init__(
        self,
        name: str,
        deployment: config.Deployment,
        vocabulary: Vocabulary,
        longest: int,
        connect: OpenChannel,
        metrics: Registry,
        rng: random.Random,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self._name = name
        self._vocabulary = vocabulary
        self._longest = longest
        self._metrics = metrics
        self._groups = Groups(name, connect, metrics, rng, scheduler)
        self.assignments = Assignments(self._groups, self._apply)
        self._open = 0
        """Number of clients' requests that are being served or wait."""
        self.take(deployment)

    def take(self, deployment: config.Deployment) -> None:
        """Serve by this deployment from now on; assignments that have changed stay as they are."""
        self.deployment = deployment
        self._apply()

    def _apply(self) -> None:
        """Serve by the deployment, with the assignments that its instances have now."""
        deployment, groups = self.assignments.take(self.deployment)
        self._router: Router[Group] = Router(
            deployment.served,
            groups,
            deployment.gateway.default_scenario,
            deployment.gateway.strict,
            self._metrics,
        )

    def show(self) -> None:
        """Set the metrics of what this gateway holds at the moment."""
        self._metrics.set(catalogue.OPEN_REQUESTS, self._open, gateway=self._name)
        self._groups.show()

    async def sweep(self) -> None:
        """Close what is in no deployment any more; see ``Groups.sweep``."""
        await self._groups.sweep()

    def lose(self, instance: str, epoch: bytes) -> None:
        """Note that a process of an instance is gone; see ``Groups.lose``."""
        self._groups.lose(instance, epoch)

    async def reaches(self, instance: str) -> bool:
        """Tell whether an instance of the deployment answers this gateway."""
        servers = self.deployment.instances("prefill") | self.deployment.instances("decode")
        server = servers.get(instance)
        return server is not None and await self._groups.inspect(instance, server) is not None

    async def close(self) -> None:
        """Close the channels; no request is served any more."""
        await self._groups.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a client's request as open, until the context ends.

        Raises:
            Unavailable: ``MAX_OPEN`` requests are open already.
        """
        if self._open >= MAX_OPEN:
            self._count(self._router.default.terms.name, State.REJECTED)
            raise errors.Unavailable(f"{MAX_OPEN} requests are open here already; try again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def answer(
        self,
        request_id: str,
        read: Callable[[], Awaitable[tuple[Parameters, Prompt]]],
        trace: Trace,
    ) -> AsyncGenerator[Part, None]:
        """Serve one request. Closing the iterator early cancels it.

        Args:
            request_id: unique among the open requests of this gateway.
            read: returns the parameters and the prompt; its errors are raised here.

        Yields:
            The parts of the answer: if it is streamed, one as tokens come; the last part has a
            finish reason.

        Raises:
            InvalidRequest, NotFound: the request can never be served.
            Unavailable, InstanceError, Suspected: see the scheduler's ``run``.
        """
        scenario = self._router.default
        try:
            asked, prompt = await read()
            model = prompt.model or self._name
            about = Asked(asked.scenario, asked.tenant, model, prompt.beginning)
            scenario = self._router.scenario(about)
            request = self._request(request_id, asked, prompt.ids, scenario.terms)
        except BaseException as error:  # its scheduler would count it otherwise
            self._count(scenario.terms.name, final_state(State.WAITING, error))
            raise
        group = scenario.next_group()
        self._metrics.add(catalogue.ROUTED_REQUESTS, 1, scenario=request.scenario, group=group.name)
        text = TextStream(self._vocabulary, asked.stop)
        trace.carry(request)
        excerpts = Excerpts(self._vocabulary, text) if prompt.in_text else None
        reads_text = prompt.in_text or bool(asked.stop)
        echo, piece, ids, told = prompt.echo, "", list[int](), 0
        with group.serving(request) as scheduler:
            async with aclosing(scheduler.run(request)) as chunks:
                async for chunk in chunks:
                    ids += chunk.ids
                    if reads_text:
                        piece += text.push(chunk.ids)
                        if text.stopped:
                            request.end_answer(text.tokens_used)
                    last = chunk.finish_reason or request.answer_ended
                    if asked.stream and not last and (echo or piece or not prompt.in_text):
                        excerpt = excerpts.part(echo, ids, piece) if excerpts else None
                        yield Part(echo + piece, ids, excerpt=excerpt)
                        told += len(ids)
                        echo, piece, ids = "", "", []
        if _within_limits(request, scenario.terms):
            self._metrics.add(catalogue.GOOD_REQUESTS, 1, scenario=request.scenario)
        if reads_text and not text.stopped:
            piece += text.finish()
        ids = ids[: request.output_tokens - told]
        stats = msgspec.json.encode(request.stats()).decode()
        excerpt = excerpts.part(echo, ids, piece) if excerpts else None
        yield Part(echo + piece, ids, request.finish_reason, stats, excerpt)

    def _count(self, scenario: str, state: State) -> None:
        """Count a request that ends in ``state`` before its group's scheduler has it."""
        outcome = state.name.lower()
        self._metrics.add(catalogue.REQUESTS, 1, scenario=scenario, outcome=outcome)

    def _request(
        self, request_id: str, asked: Parameters, prompt: Tokens, terms: config.Scenario
    ) -> Request:
        """Make the request that a client asks for; its scenario gives what is not specified.

        Raises:
            InvalidRequest: prompt or answer is too long.
        """
        limits = self.deployment.gateway
        most = limits.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise errors.InvalidRequest(
                f"the prompt has {len(prompt)} tokens; at most {most} are allowed"
            )
        ttft_limit_ms, ttft_limit_of = next(
            (limit, whose)
            for limit, whose in (
                (asked.ttft_limit_ms, "the request"),
                (terms.ttft_limit_ms, f"the scenario {terms.name}"),
                (limits.ttft_limit_ms, "the gateway"),
            )
            if limit is not None
        )
        return Request(
            id=request_id,
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
            ttft_limit_of=ttft_limit_of,
            time_limit_s=asked.timeout_us / 1e6 or math.inf,
        )


def _within_limits(request: Request, terms: config.Scenario) -> bool:
    """Tell whether an answer's tokens came as fast as its scenario promises.

    Its first token came within its limit, since otherwise the request would have ended without an
    answer.
    """
    limit = terms.tpot_limit_ms
    steps = max(request.output_tokens - 1, 1)
    return limit is None or (request.ended - request.first_token) * 1e3 <= limit * steps
