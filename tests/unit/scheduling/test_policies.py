"""Which prefill a request goes to: on demand, and as those choose that this is held against."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, get_args

import pytest

from pdserve import errors
from pdserve.config import PolicyName
from pdserve.scheduling import policies
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.request import Request, State
from tests.unit.desks import Desk
from tests.unit.inprocess import Site, virtual

if TYPE_CHECKING:
    from pathlib import Path

    from pdserve.scheduling.policies import Policy

LINEAR = {"prefill": {"per_token_ms": 0.1}, "decode": {"base_ms": 1.0}}
BOUND: list[PolicyName] = ["round_robin", "fewest_streams", "shortest_queue", "pending_tokens"]


def policy(name: PolicyName, count: int = 3, report_s: float = 0.0) -> Policy:
    """Its lines are the names of the prefills in them."""
    instances = [Instance(str(number), Desk()) for number in range(count)]

    def make(those: Any, *_: Any) -> Any:
        return "".join(one.name for one in those)

    return policies.build(name, instances, make, report_s)


class Crowd:
    """Requests that have come and not ended."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._stay: dict[str, ExitStack] = {}

    def comes(self, tokens: int = 10) -> tuple[Request, str]:
        request = Request(id=str(len(self._stay)), prompt=bytes(4 * tokens), max_tokens=1)
        stack = self._stay[request.id] = ExitStack()
        return request, str(stack.enter_context(self.policy.bound(request)))

    def choice(self, tokens: int = 10) -> str:
        return self.comes(tokens)[1]

    def ends(self, request: Request) -> None:
        self._stay[request.id].close()


def test_every_name_is_a_policy() -> None:
    assert set(get_args(PolicyName)) == {"on_demand", *BOUND}
    for name in get_args(PolicyName):
        assert "".join(map(str, policy(name).lines)) == "012"


@virtual
async def test_on_demand_is_bound_to_none() -> None:
    crowd = Crowd(policy("on_demand"))
    assert {crowd.choice() for _ in range(5)} == {"012"}


@virtual
async def test_round_robin_takes_turns_whatever_they_do() -> None:
    crowd = Crowd(policy("round_robin"))
    assert [crowd.choice(tokens) for tokens in (9000, 1, 1, 1, 9000, 1)] == list("012012")


@virtual
async def test_fewest_streams_counts_what_is_being_decoded_too() -> None:
    """The paper's old version: a prefill that is idle looks loaded by its long answers."""
    crowd = Crowd(policy("fewest_streams", 2))
    (first, _), (second, _) = crowd.comes(), crowd.comes()
    crowd.policy.computed(first)
    crowd.policy.computed(second)
    third, choice = crowd.comes()
    assert choice == "0"
    crowd.policy.computed(third)
    assert crowd.choice() == "1", "though both have nothing to compute"
    crowd.ends(first)
    crowd.ends(third)
    assert [crowd.choice(), crowd.choice()] == ["0", "0"]


@virtual
async def test_shortest_queue_counts_requests_without_a_first_token() -> None:
    crowd = Crowd(policy("shortest_queue", 2))
    long, _ = crowd.comes(tokens=8000)
    assert [crowd.choice(), crowd.choice(), crowd.choice()] == ["1", "0", "1"], "by number alone"
    crowd.policy.computed(long)
    assert crowd.choice() == "0"


@virtual
async def test_pending_tokens_counts_those_of_prompts() -> None:
    crowd = Crowd(policy("pending_tokens", 2))
    long, _ = crowd.comes(tokens=8000)
    assert [crowd.choice(2000) for _ in range(4)] == ["1"] * 4
    assert crowd.choice(100) in "01"
    crowd.policy.computed(long)
    assert crowd.choice(2000) == "0"


@pytest.mark.parametrize("name", ["shortest_queue", "pending_tokens"])
@virtual
async def test_reports_are_as_old_as_they_are_said_to_be(name: PolicyName) -> None:
    """What has happened since the last report is not seen: all follow it to the same prefill."""
    crowd = Crowd(policy(name, 2, report_s=0.1))
    await asyncio.sleep(0.15)
    first, choice = crowd.comes()
    busy, idle = choice, "10"[int(choice)]
    await asyncio.sleep(0.04)  # not reported yet
    assert [crowd.choice(), crowd.choice()] == [idle, busy], "in turn among equals"
    crowd.policy.computed(first)
    await asyncio.sleep(0.02)  # reported at 0.2 s: one at `busy`, one at `idle`
    extra, choice = crowd.comes()
    await asyncio.sleep(0.1)  # reported: two at `choice`
    other = "10"[int(choice)]
    assert [crowd.choice() for _ in range(6)] == [other] * 6, "a herd"
    await asyncio.sleep(0.1)
    assert crowd.choice() == choice
    crowd.ends(extra)


@pytest.mark.parametrize("name", BOUND)
@virtual
async def test_whoever_ends_is_counted_no_more(name: PolicyName) -> None:
    """However: computed, or before that, and once."""
    crowd = Crowd(made := policy(name, 2))
    requests = [crowd.comes(7)[0] for _ in range(10)]
    for request in requests[:5]:
        made.computed(request)
    for request in requests:
        crowd.ends(request)
    assert isinstance(made, policies.Bound)
    assert [(load.streams, load.requests, load.tokens) for load in made._loads] == [(0, 0, 0)] * 2
    assert not made._waiting


# In a whole site.


@pytest.mark.parametrize("name", BOUND)
@virtual
async def test_the_others_serve_as_well(tmp_path: Path, name: PolicyName) -> None:
    """Exact answers, cancels and limits that pass; nothing stays held or counted."""
    rng = random.Random(3)
    async with Site(
        tmp_path, prefills=2, profile=LINEAR, prefill={"slots": 1}, gateway={"policy": name}
    ) as site:
        tasks, requests = [], []
        for _ in range(60):
            requests.append(site.request(rng.randrange(100, 400), ttft_limit_s=0.4, max_tokens=4))
            tasks.append(site.start(requests[-1]))
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.3), tasks[-1].cancel)
            await asyncio.sleep(0.01)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, list):
                assert result == site.expected(request)
            else:
                assert isinstance(result, errors.Late | asyncio.CancelledError)
        assert sum(isinstance(result, list) for result in results) > 20
        assert isinstance(site.scheduler.policy, policies.Bound)
        loads = site.scheduler.policy._loads
        assert [(load.streams, load.requests, load.tokens) for load in loads] == [(0, 0, 0)] * 2
        await site.idle()


@virtual
async def test_bound_requests_wait_though_another_prefill_is_idle(tmp_path: Path) -> None:
    """dynamo#12864: queues of 83/78/5/0/0 over prefills; on demand there is one line for all."""
    waits = {}
    for name in ("round_robin", "on_demand"):
        async with Site(
            tmp_path, prefills=5, profile=LINEAR, prefill={"slots": 1}, gateway={"policy": name}
        ) as site:
            # Every fifth prompt is long: in turn, they all go to the same one.
            requests = [
                site.request(4000 if number % 5 == 0 else 100, max_tokens=1) for number in range(25)
            ]
            await asyncio.gather(*map(site.answer, requests))
            waits[name] = max(request.forwarded - request.arrived for request in requests)
            await site.idle()
    assert waits["round_robin"] > 1.5
    assert waits["on_demand"] < 0.5


# The paper's own example: 8k, 2k, 2k, 2k arrive together, of which 0.1k and 1k are cached.


async def example(site: Site) -> tuple[list[Request], float]:
    """The four, served; and the mean of their times to first token."""
    long, short = site.prompt(128), site.prompt(1024)
    for opening in (long, short):  # both prefills have both
        openings = [site.request(site.prompt(32, opening), max_tokens=1) for _ in range(2)]
        await asyncio.gather(*map(site.answer, openings))
        assert {one.prefill for one in openings} == {"prefill_0", "prefill_1"}
    requests = [
        site.request(site.prompt(8000 - 128, long), max_tokens=1),
        *(site.request(site.prompt(2000 - 1024, short), max_tokens=1) for _ in range(3)),
    ]
    await asyncio.gather(*map(site.answer, requests))
    assert [request.cached_tokens for request in requests] == [128, 1024, 1024, 1024]
    return requests, sum(one.first_token - one.arrived for one in requests) / 4


@pytest.mark.parametrize("slots", [1, 4])
@virtual
async def test_papers_example(tmp_path: Path, slots: int) -> None:
    """TensorRT-LLM#14868: the long one alone, the three short ones together; b_p = 1.

    Round robin and shortest queue give 2 + 2: a short one waits behind the long one.
    """
    means = {}
    for name in ("on_demand", "round_robin", "shortest_queue"):
        async with Site(
            tmp_path,
            prefills=2,
            profile=LINEAR,
            prefill={"slots": slots, "batch_tokens": 1},
            decode={"blocks": 1024},
            gateway={"policy": name, "report_ms": 0},
        ) as site:
            (long, *short), means[name] = await example(site)
            together = [one for one in short if one.prefill == long.prefill]
            assert len(together) == (0 if name == "on_demand" else 1), name
            assert {one.state for one in (long, *short)} == {State.FINISHED}
            await site.idle()
    # 0.1 ms a token: 787 ms, and 98, 195, 293 after each other; or 98, 195 and 885.
    assert means["on_demand"] == pytest.approx((0.787 + 0.098 + 0.195 + 0.293) / 4, abs=0.005)
    assert means["round_robin"] == pytest.approx((0.787 + 0.098 + 0.195 + 0.885) / 4, abs=0.005)
    assert means["shortest_queue"] == pytest.approx(means["round_robin"], abs=0.005)
