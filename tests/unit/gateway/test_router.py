"""Tests for the router: which scenario a request belongs to, and which of its groups serves it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve import config
from pdserve.errors import NotFound
from pdserve.gateway.router import Asked, Router, Scenario
from pdserve.observability.metrics import Registry


@dataclass
class Group:
    name: str
    healthy: bool = True


def scenario(name: str, shares: dict[str, float], *rules: config.Rule) -> config.Scenario:
    groups = tuple(config.Group(group, ("p",), ("d",), share) for group, share in shares.items())
    return config.Scenario(name, groups, rules)


def groups(*scenarios: config.Scenario) -> dict[str, Group]:
    return {group.name: Group(group.name) for one in scenarios for group in one.groups}


SCENARIOS = (
    scenario("chat", {"a": 1}),
    scenario("code", {"b": 1}, config.Rule(prefix="def "), config.Rule(tenant="acme")),
    scenario("batch", {"c": 1}, config.Rule(model="scheduler", tenant="night"), config.Rule("de")),
)


def router(strict: bool = False, metrics: Registry | None = None) -> Router[Group]:
    return Router(SCENARIOS, groups(*SCENARIOS), "chat", strict, metrics or Registry())


def request(
    label: str = "", tenant: str = "", model: str = "pdserve", beginning: str = "Hello"
) -> Asked:
    return Asked(label, tenant, model, beginning)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (request(), "chat"),
        (request("code"), "code"),
        (request("chat", tenant="acme", beginning="def f"), "chat"),
        (request(tenant="acme"), "code"),
        (request(beginning="def f():"), "code"),
        (request(beginning="def"), "batch"),
        (request(beginning="default"), "batch"),
        (request(beginning="Def f"), "chat"),
        (request(beginning=""), "chat"),
        (request(tenant="night"), "chat"),
        (request(tenant="night", model="scheduler"), "batch"),
        (request(tenant="acme", beginning="default"), "code"),
        (request(tenant="acm"), "chat"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_by_label_else_the_first_rule_else_the_default(
    strict: bool, request_: Asked, expected: str
) -> None:
    assert router(strict).scenario(request_).terms.name == expected


def test_strict_refuses_an_unknown_label_by_name() -> None:
    with pytest.raises(NotFound) as caught:
        router(strict=True).scenario(request("prose", tenant="acme"))
    assert str(caught.value) == "scenario: 'prose' is unknown; there are: chat, code, batch"
    assert caught.value.code == "NOT_FOUND"


def test_lenient_serves_an_unknown_label_by_default_and_counts_it() -> None:
    metrics = Registry()
    assert router(metrics=metrics).scenario(request("prose", tenant="acme")).terms.name == "chat"
    (change,) = metrics.drain()
    assert (change.name, change.value) == ("pdserve_unknown_scenario_requests_total", 1)


# ------------------------------------------------------------------------------------------- shares


def turns(of: Scenario[Group], count: int) -> str:
    return "".join(of.next_group().name for _ in range(count))


def shared(**shares: float) -> tuple[Scenario[Group], dict[str, Group]]:
    terms = scenario("s", shares)
    made = groups(terms)
    return Scenario(terms, made), made


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"a": 1}, "aaaa"),
        ({"a": 1, "b": 1}, "abab"),
        ({"a": 2, "b": 1, "c": 1}, "abcaabca"),
        ({"a": 5, "b": 1, "c": 1}, "aabacaa" * 2),
        ({"a": 0.5, "b": 0.25}, "abaaba"),
        ({"a": 0, "b": 1}, "bbbb"),
    ],
)
def test_turns_are_spread_by_share(shares: dict[str, float], expected: str) -> None:
    made, _ = shared(**shares)
    assert turns(made, len(expected)) == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 300))
def test_nobody_is_ever_off_its_share_by_more_than_the_others(
    shares: list[int], count: int
) -> None:
    names = "abcdef"[: len(shares)]
    made, _ = shared(**dict(zip(names, map(float, shares), strict=True)))
    served = Counter(turns(made, count))
    for name, share in zip(names, shares, strict=True):
        assert abs(served[name] - count * share / sum(shares)) < len(shares)


def test_a_group_that_has_failed_is_passed_over_until_it_is_back() -> None:
    made, members = shared(a=2, b=1, c=1)
    members["a"].healthy = False
    assert Counter(turns(made, 8)) == {"b": 4, "c": 4}
    members["a"].healthy = True
    back = turns(made, 40)
    assert Counter(back) == {"a": 20, "b": 10, "c": 10}, (
        "it does not get the turns that it has missed"
    )
    assert not any({*pair} == {"b"} for pair in pairwise(back))


def test_if_all_have_failed_they_take_turns_as_ever() -> None:
    made, members = shared(a=1, b=1)
    for one in members.values():
        one.healthy = False
    assert turns(made, 4) == "abab"


def test_a_group_without_a_share_is_asked_by_nobody() -> None:
    made, members = shared(a=1, b=0)
    members["a"].healthy = False
    assert turns(made, 3) == "aaa"
