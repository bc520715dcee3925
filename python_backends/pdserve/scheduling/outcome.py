"""How a request has ended, and what is counted of it."""

from __future__ import annotations

import asyncio

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.scheduling.request import Request, State


def final_state(state: State, error: BaseException) -> State:
    """Return the final state of a request that ``error`` stopped in ``state``."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return State.CANCELLED
    if isinstance(error, errors.Late):
        return State.EXPIRED
    if state in (State.WAITING, State.PREFILLING) and isinstance(
        error, errors.Unavailable | errors.InvalidRequest | errors.NotFound
    ):
        return State.REJECTED
    return State.FAILED


def account(request: Request, metrics: Registry) -> None:
    """Count a request that has ended, by its outcome; its tokens; and observe its latencies."""
    scenario, group = request.scenario, request.group
    outcome = request.finish_reason or request.state.name.lower()
    metrics.add(catalogue.REQUESTS, 1, scenario=scenario, outcome=outcome)
    if request.first_token:
        ttft = request.first_token - request.arrived
        metrics.observe(catalogue.TTFT, ttft, scenario=scenario, group=group)
    if request.output_tokens:
        metrics.add(catalogue.OUTPUT_TOKENS, request.output_tokens, scenario=scenario, group=group)
    if request.state is State.FINISHED:
        cached = request.cached_tokens
        for source, tokens in (("cached", cached), ("computed", request.prompt_tokens - cached)):
            metrics.add(
                catalogue.PROMPT_TOKENS, tokens, scenario=scenario, group=group, source=source
            )
        e2e = request.ended - request.arrived
        metrics.observe(catalogue.E2E, e2e, scenario=scenario, group=group)
        if request.output_tokens > 1:
            tpot = (request.ended - request.first_token) / (request.output_tokens - 1)
            metrics.observe(catalogue.TPOT, tpot, scenario=scenario, group=group)
