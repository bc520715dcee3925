"""Tests that no wait is unbounded: a request's own limits, and components that stop."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from pdserve import errors
from pdserve.rpc.messages import (
    Accepted,
    Connected,
    Described,
    Prefilled,
    PrefillRequest,
    Tokens,
)
from pdserve.scheduling.circuit_breaker import LONGEST_S
from pdserve.scheduling.offering import ANSWER_S
from pdserve.scheduling.request import RECOVER_S, Request, State
from tests.unit.inprocess import Message, Site, virtual

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
LIMIT_S = 1.0
Busy = asyncio.Task[list[int]]


def everything(message: Message) -> bool:
    return True


def first_of(*kinds: type) -> Callable[[Message], bool]:
    return lambda message: isinstance(message, kinds)


# Where a request may be when its time is over: how the site is stopped there.


async def no_idle_prefill(site: Site) -> list[Busy]:
    other = site.beside()
    busy = [other.start(other.request(max_tokens=1)) for _ in range(4)]
    await asyncio.sleep(0.01)
    return busy


async def silent_prefill(site: Site) -> None:
    site.p_links[0].lose = everything


async def no_healthy_prefill(site: Site) -> None:
    site.p_links[0].broken = "connection refused"


async def long_forward(site: Site) -> None:
    """The prompt takes 5 s to compute."""


async def prefill_accepts_and_falls_silent(site: Site) -> None:
    site.p_links[0].lose = first_of(Prefilled)


async def no_idle_decode(site: Site) -> list[Busy]:
    other = site.beside()
    busy = other.start(other.request(max_tokens=600))
    await asyncio.sleep(0.1)
    return [busy]


async def silent_decode(site: Site) -> None:
    site.d_links[0].lose = everything


async def no_healthy_decode(site: Site) -> None:
    site.d_links[0].broken = "connection refused"


async def decode_accepts_and_falls_silent(site: Site) -> None:
    site.d_links[0].lose = first_of(Tokens)


async def long_answer(site: Site) -> None:
    """The answer takes 5 s to decode."""


async def nobody_goes_on_with_it(site: Site) -> None:
    """The decode is lost in the middle of an answer, and no prefill can be reached."""

    def lose() -> None:
        site.p_links[0].break_("connection refused")
        site.d_links[0].break_("connection refused")

    asyncio.get_running_loop().call_later(0.5, lose)


async def not_connected(site: Site) -> None:
    """The decode has no link to the prefill, which does not send its endpoint."""
    site.p_links[0].lose = first_of(Described)


async def slow_to_connect(site: Site) -> None:
    site.d_links[0].lose = first_of(Connected)


SHORT: dict[str, Any] = {"prefill": {"slots": 1}, "decode": {"slots": 1}}
LONG = {"profile": {"prefill": {"base_ms": 5000.0}, "decode": {"base_ms": 10.0}}}
STOPS: list[tuple[Callable[[Site], Any], dict[str, Any], State]] = [
    (no_idle_prefill, {**LONG, "prefill": {"slots": 4}}, State.WAITING),
    (silent_prefill, {}, State.WAITING),
    (no_healthy_prefill, {}, State.WAITING),
    (long_forward, LONG, State.PREFILLING),
    (prefill_accepts_and_falls_silent, {}, State.PREFILLING),
    (no_idle_decode, SHORT, State.PREFILLED),
    (silent_decode, {}, State.PREFILLED),
    (no_healthy_decode, {}, State.PREFILLED),
    (decode_accepts_and_falls_silent, {}, State.TRANSFERRING),
    (long_answer, {}, State.DECODING),
    (nobody_goes_on_with_it, {}, State.WAITING),
    (not_connected, {"linked": False}, State.PREFILLED),
    (slow_to_connect, {"linked": False}, State.PREFILLED),
    (long_forward, {**LONG, "gateway": {"local": "on"}}, State.DECODING),
    (silent_decode, {"gateway": {"local": "on"}, "prefills": 1}, State.WAITING),
]


@pytest.mark.parametrize(
    ("stop", "fields", "state"), STOPS, ids=[f"{stop.__name__}-{s.name}" for stop, _, s in STOPS]
)
@virtual
async def test_time_limit_ends_a_request_wherever_it_is(
    tmp_path: Path,
    stop: Callable[[Site], Any],
    fields: dict[str, Any],
    state: State,
) -> None:
    """dynamo#13088: it expires late and everything is freed, though no instance answers."""
    async with Site(tmp_path, **{"profile": TIMES, "stall_s": 20.0, **fields}) as site:
        busy: list[Busy] = await stop(site) or []
        request = site.request(max_tokens=500, time_limit_s=LIMIT_S)
        task = site.start(request)
        await asyncio.sleep(LIMIT_S - 0.01)
        assert request.state is state
        with pytest.raises(errors.Late, match="limit"):
            await task
        assert request.state is State.EXPIRED
        assert request.ended - request.arrived == pytest.approx(LIMIT_S, abs=1e-3)
        assert [one.load.open for role in site.instances for one in role] == [0, 0]
        assert site.total("pdserve_requests_total", outcome="expired") == 1
        for link in (*site.p_links, *site.d_links):
            link.lose, link.broken = (lambda message: False), None
        for task in busy:
            task.cancel()
        await asyncio.sleep(7.0)  # forwards, answers and leases of messages that were lost
        assert site.held() == {}


@virtual
async def test_a_limit_longer_than_it_takes_changes_nothing(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        request = site.request(max_tokens=50, time_limit_s=0.6)
        assert await site.answer(request) == site.expected(request)
        await site.idle()


@virtual
async def test_no_prefill_is_asked_once_the_limit_has_passed(tmp_path: Path) -> None:
    """A loop that is late makes the offer after the limit, which a message cannot express."""
    async with Site(tmp_path) as site:
        request = site.request(ttft_limit_s=-0.001)
        with pytest.raises(errors.Late):
            await site.answer(request)
        assert not site.p_links[0].of(PrefillRequest)
        assert site.instances[0][0].breaker.closed
        await site.idle()


@virtual
async def test_a_limit_that_passes_is_nobodys_fault(tmp_path: Path) -> None:
    """No instance's breaker opens because of it."""
    async with Site(tmp_path, profile=TIMES) as site:
        for limit in (0.01, 0.022, 0.1, 0.3):
            with pytest.raises(errors.Late):
                await site.answer(site.request(max_tokens=100, time_limit_s=limit))
        assert all(one.breaker.closed for role in site.instances for one in role)
        await site.idle()


# ---------------------- one component after the other stops for 30 s under load, like after SIGSTOP

FROZEN_S = 30.0
STALL_S = 3.0


def freeze(site: Site, what: str) -> Callable[[], None]:
    """Stop the first instance of a kind; return the function that resumes it."""
    thaw = asyncio.Event()
    if what.endswith("server"):
        link = (site.p_links if what == "prefill server" else site.d_links)[0]
        arrive, back = link._arrive, link.arrive_back
        kept: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        # Nothing is lost: all messages are handled afterwards.
        link._arrive = lambda *args: kept.append((arrive, args))  # type: ignore[method-assign]
        link.arrive_back = lambda *args: kept.append((back, args))  # type: ignore[method-assign]

        def go_on() -> None:
            link._arrive, link.arrive_back = arrive, back  # type: ignore[method-assign]
            for deal, args in kept:
                deal(*args)

        return go_on
    engine: Any = (site.p_engines if what == "prefill engine" else site.d_engines)[0]
    name = "prefill" if what == "prefill engine" else "step"
    compute = getattr(engine, name)

    async def stopped(*args: Any) -> Any:
        await thaw.wait()
        return await compute(*args)

    setattr(engine, name, stopped)
    return thaw.set


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "what", ["prefill server", "decode server", "prefill engine", "decode engine"]
)
@virtual
async def test_frozen_for_30_seconds(tmp_path: Path, what: str, count: int) -> None:
    """TensorRT-LLM#15363, dynamo#13088: every request ends within its bounds; service resumes.

    If there is another instance of the kind, no request fails.
    """
    rng = random.Random(5)
    async with Site(
        tmp_path,
        prefills=count,
        decodes=count,
        profile=TIMES,
        prefill={"slots": 4, "lease_s": 4.0},
        stall_s=STALL_S,
        seed=5,
    ) as site:
        loop = asyncio.get_running_loop()
        requests: list[Request] = []
        tasks: list[asyncio.Task[list[int]]] = []
        limit = 5.0 if count == 1 else 20.0

        async def load(seconds: float) -> None:
            until = loop.time() + seconds
            while loop.time() < until:
                requests.append(site.request(max_tokens=rng.randrange(1, 40), ttft_limit_s=limit))
                tasks.append(site.start(requests[-1]))
                await asyncio.sleep(rng.expovariate(4))

        await load(2.0)
        go_on = freeze(site, what)
        await load(FROZEN_S)
        go_on()
        thawed = len(requests)
        await load(20.0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            took = request.ended - request.arrived
            if isinstance(result, list):
                assert result == site.expected(request)
            else:
                assert isinstance(result, errors.Unavailable | errors.InstanceError), result
                assert count == 1
            # Its limit, one more silence or answer, and the time of recovery.
            assert took < limit + RECOVER_S + STALL_S + ANSWER_S
        served = [isinstance(result, list) for result in results]
        assert all(served[-10:]), "as before"
        assert all(served) == (count == 2)
        back = next(i for i in range(thawed, len(served)) if served[i])
        assert requests[back].ended - requests[thawed].arrived < LONGEST_S + 1.0
        await site.idle(6.0)


@virtual
async def test_acceptance_that_is_repeated_is_no_answer(tmp_path: Path) -> None:
    """The instance only repeats that it is alive, so the request's own limit bounds the wait."""
    async with Site(tmp_path, profile={"prefill": {"base_ms": 60_000.0}}, stall_s=6.0) as site:
        request = site.request(time_limit_s=20.0)
        with pytest.raises(errors.Late):
            await site.answer(request)
        assert len(site.p_links[0].of(Accepted)) == 4
        assert request.ended - request.arrived == pytest.approx(20.0, abs=1e-3)
