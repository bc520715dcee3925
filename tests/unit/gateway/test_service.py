"""Tests for the gateway's service, which serves a request from its arrival to its answer."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from pdserve import config
from pdserve.control.assignment import ANY, Assignment
from pdserve.errors import InstanceError, InvalidRequest, NotFound, Unavailable
from pdserve.gateway import service
from pdserve.gateway.parameters import Parameters
from pdserve.gateway.service import Part, Prompt, Service
from pdserve.gateway.trace_context import Trace
from pdserve.rpc.messages import Assign, Drain
from pdserve.text import vocabulary
from tests.servers import default_deployment
from tests.unit.gateway.test_groups import ConnectedGroups, deployment
from tests.unit.inprocess import Site, process, virtual

if TYPE_CHECKING:
    from pdserve.scheduling.request import Request

TIMES = {"prefill": {"base_ms": 20.0}, "decode": {"base_ms": 10.0}}
GROUP = config.Group("a", ("prefill_0",), ("decode_0",))
WORDS = vocabulary.read(Path(default_deployment("emulated").model))


def new_service(site: Site) -> Service:
    connected = ConnectedGroups(site)
    rng = random.Random(1)
    wanted = deployment(GROUP)
    return Service("pdserve", wanted, WORDS, 2048, connected._connect, site.metrics, rng)


def parameters(**fields: Any) -> Parameters:
    nothing: dict[str, Any] = {
        "max_tokens": None,
        "sampling": {},
        "stop": (),
        "stream": True,
        "ignore_eos": False,
        "scenario": "",
        "tenant": "",
        "priority": None,
        "ttft_limit_ms": None,
        "timeout_us": 0,
    }
    return Parameters(**{**nothing, **fields})


async def parts(
    of: Service, request: Request, *, in_text: bool = False, echo: str = "", **fields: Any
) -> list[Part]:
    """Return the parts of the answer to the prompt of ``request``, which is not sent itself."""
    prompt = Prompt(np.frombuffer(request.prompt, "<i4"), echo, in_text=in_text)

    async def read() -> tuple[Parameters, Prompt]:
        return parameters(max_tokens=request.max_tokens, **fields), prompt

    answer = of.answer("1", read, Trace(""))
    async with aclosing(answer) as found:
        return [part async for part in found]


@virtual
async def test_tokens_come_as_they_are_computed_and_the_last_part_ends(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served, request = new_service(site), site.request(max_tokens=6)
        found = await parts(served, request)
        assert [token for part in found for token in part.ids] == site.expected(request)
        assert [part.finish_reason for part in found] == [""] * (len(found) - 1) + ["length"]
        assert len(found) > 2
        assert not any(part.stats for part in found[:-1])
        stats = json.loads(found[-1].stats)
        assert (stats["output_tokens"], stats["group"]) == (6, "a")
        await served.close()


@virtual
async def test_what_is_not_streamed_is_one_part(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served, request = new_service(site), site.request(max_tokens=6)
        (part,) = await parts(served, request, stream=False, in_text=True, echo="Well: ")
        assert part.text == "Well: " + WORDS.decode(site.expected(request))
        assert part.finish_reason == "length"
        await served.close()


@virtual
async def test_a_stop_string_ends_the_answer_before_it(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served, request = new_service(site), site.request(max_tokens=12)
        text = WORDS.decode(site.expected(request))
        stop = text[-6:-3]
        found = await parts(served, request, stop=(stop,), in_text=True)
        assert "".join(part.text for part in found) == text[: text.index(stop)]
        assert found[-1].finish_reason == "stop"
        ids = [token for part in found for token in part.ids]
        assert ids == site.expected(request)[: len(ids)]
        await site.idle()
        await served.close()


@virtual
async def test_who_closes_the_answer_cancels_the_request(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served, request = new_service(site), site.request(max_tokens=100)
        prompt = Prompt(np.frombuffer(request.prompt, "<i4"))

        async def read() -> tuple[Parameters, Prompt]:
            return parameters(max_tokens=100), prompt

        async with aclosing(served.answer("1", read, Trace(""))) as found:
            async for part in found:
                assert part.ids
                break
        await site.idle()
        assert site.total("pdserve_requests_total", outcome="cancelled") == 1
        await served.close()


@pytest.mark.parametrize(
    ("asked", "of_scenario", "said"),
    [
        (5, 6, "5 ms of the request"),
        (None, 6, "6 ms of the scenario s"),
        (None, None, "7 ms of the gateway"),
    ],
)
@virtual
async def test_an_error_says_whose_limit_has_passed(
    tmp_path: Path, asked: int | None, of_scenario: int | None, said: str
) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served, request = new_service(site), site.request(max_tokens=6)
        wanted = deployment(GROUP)
        replace = msgspec.structs.replace
        served.take(
            replace(
                wanted,
                gateway=replace(wanted.gateway, ttft_limit_ms=7),
                scenarios=(replace(wanted.scenarios[0], ttft_limit_ms=of_scenario),),
            )
        )
        with pytest.raises(Unavailable, match=f"within the TTFT limit of {said} "):
            await parts(served, request, ttft_limit_ms=asked)
        await served.close()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "cancelled"),
        (InstanceError("the tokenizer has failed"), "failed"),
        (Unavailable("the tokenizer is busy"), "rejected"),
    ],
)
@virtual
async def test_a_request_that_ends_while_it_is_read_is_counted(
    tmp_path: Path, error: Exception | None, outcome: str
) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served = new_service(site)

        async def read() -> tuple[Parameters, Prompt]:
            await asyncio.sleep(1.0)
            assert error is not None
            raise error

        answer = served.answer("1", read, Trace(""))
        reading = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.1)
        if error is None:
            reading.cancel()
        with pytest.raises(type(error) if error else asyncio.CancelledError):
            await reading
        assert site.total("pdserve_requests_total", scenario="s", outcome=outcome) == 1
        assert site.total("pdserve_requests_total") == 1
        await served.close()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"max_tokens": 4000}, InvalidRequest), ({"scenario": "none"}, NotFound)],
)
@virtual
async def test_what_can_never_be_served_is_rejected(
    tmp_path: Path, fields: dict[str, Any], kind: type[Exception]
) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served = new_service(site)
        strict = deployment(GROUP)
        served.take(
            config.Deployment(
                model="m",
                servers=strict.servers,
                scenarios=strict.scenarios,
                gateway=config.Gateway(default_scenario="s", strict=True),
            )
        )
        prompt = Prompt(np.arange(3, 23, dtype=np.int32), in_text=True)

        async def read() -> tuple[Parameters, Prompt]:
            return parameters(**fields), prompt

        async with aclosing(served.answer("1", read, Trace(""))) as found:
            with pytest.raises(kind):
                await anext(found)
        assert site.total("pdserve_requests_total", outcome="rejected", scenario="s") == 1
        await served.close()


@virtual
async def test_open_requests_are_bounded(tmp_path: Path) -> None:
    async with Site(tmp_path, profile=TIMES) as site:
        served = new_service(site)
        with mock.patch.object(service, "MAX_OPEN", 1), served.admitted():
            with pytest.raises(Unavailable, match="1 requests are open"), served.admitted():
                pass
            assert site.total("pdserve_requests_total", outcome="rejected") == 1
        with served.admitted():
            pass
        await served.close()


@pytest.mark.parametrize("shared", [False, True])
@virtual
async def test_no_prefix_is_found_after_a_move_to_another_scenario(
    tmp_path: Path, shared: bool
) -> None:
    """The instances keep their memory, and so do the gateways' directories until they hear."""
    async with Site(tmp_path, prefills=2, decodes=2, profile=TIMES) as site:
        connected, rng = ConnectedGroups(site), random.Random(1)
        chat = config.Scenario("s", (GROUP,), shared_prefixes=shared)
        other = config.Group("b", ("prefill_1",), ("decode_1",))
        code = config.Scenario("code", (other,), shared_prefixes=shared)
        wanted = msgspec.structs.replace(deployment(GROUP, other), scenarios=(chat, code))
        served = Service("pdserve", wanted, WORDS, 2048, connected._connect, site.metrics, rng)
        following = asyncio.create_task(served.assignments.follow())
        request = site.request(100, max_tokens=2)

        async def cached(scenario: str) -> tuple[str, int]:
            found = await parts(served, request, scenario=scenario, tenant="acme")
            stats = json.loads(found[-1].stats)
            return stats["prefill"], stats["cached_tokens"]

        assert await cached("s") == ("prefill_0", 0)
        assert await cached("s") == ("prefill_0", 96)

        def control(message: Any) -> None:
            instance = site.assigned["prefill_0"]
            instance.handle(ANY, message, "agent", lambda reply, _: replies.append(reply))

        replies: list[Any] = []
        control(Drain("drain", process("prefill_0"), 1, 60.0))
        await asyncio.sleep(0.1)
        control(Assign("assign", process("prefill_0"), 1, Assignment(2, "prefill", "b")))
        assert replies[-1].assignment.number == 2
        wanted = msgspec.structs.replace(
            wanted,
            scenarios=(chat, msgspec.structs.replace(code, groups=(_without(other),))),
        )
        served.take(wanted)
        await asyncio.sleep(5.0)
        assert await cached("code") == ("prefill_0", 0)
        assert await cached("code") == ("prefill_0", 96)
        following.cancel()
        await served.close()


def _without(group: config.Group) -> config.Group:
    """Leave the group nothing but what moves to it."""
    return msgspec.structs.replace(group, prefill=())
