"""Tests for the choice of a prefill: on-demand forwarding, and the policies compared with it."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import pytest
from perf.baselines.policies import BOUND, SCHEDULERS, Binding, BoundScheduler, PolicyName
from perf.scheduling import servers

import pdserve
from pdctl.paths import MODEL_REPOSITORY
from pdctl.repository import render
from pdserve import errors
from pdserve.scheduling.kv_links import ROUND_S
from pdserve.scheduling.request import Request, State
from pdserve.scheduling.scheduler import Scheduler
from tests.unit.gateway.test_groups import ConnectedGroups, serve
from tests.unit.inprocess import Site, virtual
from tests.unit.scheduling.test_membership import takes_whoever_comes_and_lets_go, wanted

LINEAR = {"prefill": {"per_token_ms": 0.1}, "decode": {"base_ms": 1.0}}


def binding(name: PolicyName, count: int = 3, report_s: float = 0.0) -> Binding[str]:
    """Return a binding whose queues are the names of the prefills."""
    return Binding("0123456789"[:count], BOUND[name].cost, report_s)


class OpenRequests:
    """The requests that have arrived and not ended."""

    def __init__(self, binding: Binding[str]) -> None:
        self.binding = binding
        self._stay: dict[str, ExitStack] = {}

    def comes(self, tokens: int = 10) -> tuple[Request, str]:
        request = Request(id=str(len(self._stay)), prompt=bytes(4 * tokens), max_tokens=1)
        stack = self._stay[request.id] = ExitStack()
        return request, stack.enter_context(self.binding.bound(request))

    def choice(self, tokens: int = 10) -> str:
        return self.comes(tokens)[1]

    def ends(self, request: Request) -> None:
        self._stay[request.id].close()


def test_every_name_is_a_policy() -> None:
    assert set(get_args(PolicyName)) == set(SCHEDULERS) == {"on_demand", *BOUND}
    assert SCHEDULERS["on_demand"] is Scheduler, "which is pdserve's own"
    for name in BOUND:
        assert "".join(binding(name).loads) == "012"


@virtual
async def test_on_demand_is_bound_to_none(tmp_path: Path) -> None:
    async with Site(tmp_path, prefills=3) as site:
        stages = {id(site.scheduler.prefill_stage(site.request())) for _ in range(5)}
        assert len(stages) == 1
        assert site.scheduler.prefill_stage(site.request()).forwarding is site.scheduler.prefills
        assert [one.name for one in site.scheduler.prefills.instances] == [
            "prefill_0",
            "prefill_1",
            "prefill_2",
        ]


@virtual
async def test_round_robin_takes_turns_whatever_they_do() -> None:
    open_requests = OpenRequests(binding("round_robin"))
    assert [open_requests.choice(tokens) for tokens in (9000, 1, 1, 1, 9000, 1)] == list("012012")


@virtual
async def test_fewest_streams_counts_what_is_being_decoded_too() -> None:
    """In the paper's earlier policy, an idle prefill looks loaded because of its long answers."""
    open_requests = OpenRequests(binding("fewest_streams", 2))
    (first, _), (second, _) = open_requests.comes(), open_requests.comes()
    open_requests.binding.computed(first)
    open_requests.binding.computed(second)
    third, choice = open_requests.comes()
    assert choice == "0"
    open_requests.binding.computed(third)
    assert open_requests.choice() == "1", "though neither of them has anything to compute"
    open_requests.ends(first)
    open_requests.ends(third)
    assert [open_requests.choice(), open_requests.choice()] == ["0", "0"]


@virtual
async def test_shortest_queue_counts_requests_without_a_first_token() -> None:
    open_requests = OpenRequests(binding("shortest_queue", 2))
    long, _ = open_requests.comes(tokens=8000)
    assert [open_requests.choice(), open_requests.choice(), open_requests.choice()] == [
        "1",
        "0",
        "1",
    ], "by their number alone"
    open_requests.binding.computed(long)
    assert open_requests.choice() == "0"


@virtual
async def test_pending_tokens_counts_those_of_prompts() -> None:
    open_requests = OpenRequests(binding("pending_tokens", 2))
    long, _ = open_requests.comes(tokens=8000)
    assert [open_requests.choice(2000) for _ in range(4)] == ["1"] * 4
    assert open_requests.choice(100) in "01"
    open_requests.binding.computed(long)
    assert open_requests.choice(2000) == "0"


@pytest.mark.parametrize("name", ["shortest_queue", "pending_tokens"])
@virtual
async def test_reports_are_as_old_as_they_are_said_to_be(name: PolicyName) -> None:
    """Nothing is seen between two reports, so all requests go to the same prefill."""
    open_requests = OpenRequests(binding(name, 2, report_s=0.1))
    await asyncio.sleep(0.15)
    first, choice = open_requests.comes()
    busy, idle = choice, "10"[int(choice)]
    await asyncio.sleep(0.04)  # not reported yet
    assert [open_requests.choice(), open_requests.choice()] == [idle, busy], "in turn among equals"
    open_requests.binding.computed(first)
    await asyncio.sleep(0.02)  # reported at 0.2 s: one request at `busy`, one at `idle`
    extra, choice = open_requests.comes()
    await asyncio.sleep(0.1)  # reported: two requests at `choice`
    other = "10"[int(choice)]
    assert [open_requests.choice() for _ in range(6)] == [other] * 6, "a herd effect"
    await asyncio.sleep(0.1)
    assert open_requests.choice() == choice
    open_requests.ends(extra)


@pytest.mark.parametrize("name", BOUND)
@virtual
async def test_whoever_ends_is_counted_no_more(name: PolicyName) -> None:
    """It leaves once, whether it was computed or ended before that."""
    open_requests = OpenRequests(made := binding(name, 2))
    requests = [open_requests.comes(7)[0] for _ in range(10)]
    for request in requests[:5]:
        made.computed(request)
    for request in requests:
        open_requests.ends(request)
    loads = made.loads.values()
    assert [(load.streams, load.requests, load.tokens) for load in loads] == [(0, 0, 0)] * 2
    assert not made._waiting


# ------------------------------------------------------------------------------------- a whole site


@pytest.mark.parametrize("name", BOUND)
@virtual
async def test_the_others_serve_as_well(tmp_path: Path, name: PolicyName) -> None:
    """Answers are exact, cancels and limits work, and afterwards nothing is held or counted."""
    rng = random.Random(3)
    async with Site(
        tmp_path, prefills=2, profile=LINEAR, prefill={"slots": 1}, scheduler_type=BOUND[name]
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
        assert isinstance(site.scheduler, BoundScheduler)
        loads = site.scheduler.binding.loads.values()
        assert [(load.streams, load.requests, load.tokens) for load in loads] == [(0, 0, 0)] * 2
        await site.idle()


@virtual
async def test_bound_requests_wait_though_another_prefill_is_idle(tmp_path: Path) -> None:
    """dynamo#12864: queues of 83/78/5/0/0 over prefills; on-demand forwarding has one queue."""
    waits = {}
    names: tuple[PolicyName, ...] = ("round_robin", "on_demand")
    for name in names:
        async with Site(
            tmp_path,
            prefills=5,
            profile=LINEAR,
            prefill={"slots": 1},
            scheduler_type=SCHEDULERS[name],
        ) as site:
            # Every fifth prompt is long, so round robin sends all long ones to the same prefill.
            requests = [
                site.request(4000 if number % 5 == 0 else 100, max_tokens=1) for number in range(25)
            ]
            await asyncio.gather(*map(site.answer, requests))
            waits[name] = max(request.forwarded - request.arrived for request in requests)
            await site.idle()
    assert waits["round_robin"] > 1.5
    assert waits["on_demand"] < 0.5


@pytest.mark.parametrize("name", BOUND)
@virtual
async def test_a_group_takes_whoever_comes_and_lets_go(tmp_path: Path, name: PolicyName) -> None:
    await takes_whoever_comes_and_lets_go(tmp_path, BOUND[name])


@virtual
async def test_who_waits_for_a_prefill_that_leaves_goes_to_another(tmp_path: Path) -> None:
    async with Site(
        tmp_path, prefills=2, decodes=2, profile=LINEAR, prefill={"slots": 1, "batch": 1}
    ) as site:
        connected = ConnectedGroups(site, BOUND["round_robin"])
        group = connected.groups.take(wanted(2, 2))["a"]
        await asyncio.sleep(ROUND_S)
        requests = [site.request(2000, max_tokens=1) for _ in range(6)]
        tasks = [asyncio.create_task(serve(group, one)) for one in requests]
        await asyncio.sleep(0.1)
        assert {one.prefill for one in requests[:2]} == {"prefill_0", "prefill_1"}
        assert connected.groups.take(wanted(2, 2, first=1))["a"] is group
        assert await asyncio.gather(*tasks) == [site.expected(one) for one in requests]
        assert {one.prefill for one in requests[2:]} == {"prefill_1"}
        assert all(one.attempts == 1 for one in requests)
        await connected.groups.close()


async def queued(tmp_path: Path, name: PolicyName) -> tuple[list[str], str]:
    """Return the order in which waiting requests are forwarded, and how the last one ends."""
    async with Site(
        tmp_path, profile=LINEAR, prefill={"slots": 1, "batch": 1}, scheduler_type=SCHEDULERS[name]
    ) as site:
        for _ in range(8):  # from then on the duration of a prefill is known
            await site.answer(site.request(1000, max_tokens=1))
        asked = {
            "first": site.request(1000, max_tokens=1),
            "second": site.request(1000, max_tokens=1),
            "urgent": site.request(1000, max_tokens=1, priority=5),
            "late": site.request(1000, max_tokens=1, priority=-10, ttft_limit_s=0.35),
        }
        tasks = []
        for one in asked.values():
            tasks.append(site.start(one))
            await asyncio.sleep(0.01)
        *_, end = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(end, errors.Late)
        await site.idle()
        forwarded = {name: one.forwarded for name, one in asked.items() if one.forwarded}
        return sorted(forwarded, key=forwarded.__getitem__), str(end)


@virtual
async def test_a_queue_is_first_come_first_served_up_to_the_limit(tmp_path: Path) -> None:
    """On-demand forwarding goes by priority, and ends requests that would be finished too late."""
    order, end = await queued(tmp_path, "round_robin")
    assert order == ["first", "second", "urgent", "late"]
    assert end.startswith("no first token within the TTFT limit of 350 ms")
    order, end = await queued(tmp_path, "on_demand")
    assert order == ["first", "urgent", "second"]
    assert "a prefill would take" in end


# The paper's own example: 8k, 2k, 2k, 2k arrive together, of which 0.1k and 1k are cached.


async def example(site: Site) -> tuple[list[Request], float]:
    """Serve the four requests; return them and their mean TTFT."""
    long, short = site.prompt(128), site.prompt(1024)
    for opening in (long, short):  # both prefills have both prefixes
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
async def test_papers_example(tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-LLM#14868: the long prompt alone, the three short ones together; b_p = 1.

    Round robin and shortest queue put two prompts on each prefill, so a short one waits behind the
    long one.
    """
    monkeypatch.setattr(BOUND["shortest_queue"], "report_s", 0.0)
    means = {}
    names: tuple[PolicyName, ...] = ("on_demand", "round_robin", "shortest_queue")
    for name in names:
        async with Site(
            tmp_path,
            prefills=2,
            profile=LINEAR,
            prefill={"slots": slots, "batch_tokens": 1},
            decode={"blocks": 1024},
            scheduler_type=SCHEDULERS[name],
        ) as site:
            (long, *short), means[name] = await example(site)
            together = [one for one in short if one.prefill == long.prefill]
            assert len(together) == (0 if name == "on_demand" else 1), name
            assert {one.state for one in (long, *short)} == {State.FINISHED}
            await site.idle()
    # At 0.1 ms a token: 787 ms, and 98, 195, 293 ms after one another; or 98, 195 and 885 ms.
    assert means["on_demand"] == pytest.approx((0.787 + 0.098 + 0.195 + 0.293) / 4, abs=0.005)
    assert means["round_robin"] == pytest.approx((0.787 + 0.098 + 0.195 + 0.885) / 4, abs=0.005)
    assert means["shortest_queue"] == pytest.approx(means["round_robin"], abs=0.005)


# ------------------------------------------------------------------------------------ a real server


def test_the_model_finds_its_policy_without_the_project_on_its_path(tmp_path: Path) -> None:
    """The import works as in Triton's stub, which has no package but the installed one."""
    source = servers.repository("pending_tokens", tmp_path / "source")
    made = servers.deployment("pool")
    render(made, made.servers[0], source, tmp_path / "models")
    model = tmp_path / "models" / "scheduler"
    assert (
        'key: "policy" value: { string_value: "pending_tokens" }'
        in (model / "config.pbtxt").read_text()
    )
    code = f"""
import importlib, json, sys
from unittest import mock

sys.modules["triton_python_backend_utils"] = mock.MagicMock()
sys.path[:0] = [{str(model)!r}]
found = importlib.import_module("1.model").TritonPythonModel
from pdserve.triton import gateway
with mock.patch.object(gateway.GatewayModel, "initialize"):
    one = found()
    config = {{"parameters": {{"policy": {{"string_value": "pending_tokens"}}}}}}
    one.initialize({{"model_config": json.dumps(config)}})
print(one.scheduler.__name__, "perf" in sys.modules)
"""
    package = str(Path(pdserve.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": package},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.split() == ["PendingTokens", "False"], told.stderr


def test_on_demand_is_measured_with_pdserves_own_models(tmp_path: Path) -> None:
    assert servers.repository("on_demand", tmp_path / "source") == MODEL_REPOSITORY
