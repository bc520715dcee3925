"""Tests for values of pairs, whose instances may change their roles."""

from __future__ import annotations

from pdserve.scheduling.pairs import Pairs


def test_two_instances_may_form_a_pair_in_both_roles() -> None:
    pairs = Pairs[str]()
    pairs["a", "b"] = "before"
    pairs["b", "a"] = "after both have changed their roles"
    assert pairs.pop(("a", "b")) == "before"
    assert list(pairs.others("a")) == ["b"]
    assert pairs.pop(("a", "b")) is None
    assert pairs.pop(("b", "a")) == "after both have changed their roles"
    assert (len(pairs), list(pairs.others("a")), list(pairs.others("b"))) == (0, [], [])


def test_dropping_an_instance_drops_its_pairs_in_both_roles() -> None:
    pairs = Pairs[int]()
    pairs["a", "b"], pairs["b", "a"], pairs["c", "a"], pairs["c", "b"] = range(4)
    pairs.drop("a")
    assert pairs.known == {("c", "b"): 3}
    assert list(pairs.others("b")) == ["c"]
