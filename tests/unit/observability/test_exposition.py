"""Tests for a page of metrics without Triton, as Prometheus reads it."""

from __future__ import annotations

from pdserve.observability import catalogue
from pdserve.observability.exposition import Exposition
from pdserve.observability.metrics import Registry


def test_counters_add_up_gauges_are_set_and_what_ends_is_gone() -> None:
    registry = Registry()
    page = Exposition(registry)
    assert page.page() == ""
    registry.add(catalogue.CONTROL_TURNS, 2, outcome="nothing")
    registry.set(catalogue.CONTROL_LEADER, 1.0)
    registry.observe(catalogue.CONTROL_TURN, 0.25)
    registry.set(catalogue.CONTROL_INSTANCES, 3, group="chat", role="decode", state="serving")
    first = page.page()
    assert "# TYPE pdserve_control_turns_total counter\n" in first
    assert 'pdserve_control_turns_total{outcome="nothing"} 2\n' in first
    registry.add(catalogue.CONTROL_TURNS, 1, outcome="nothing")
    registry.set(catalogue.CONTROL_LEADER, 0.0)
    registry.observe(catalogue.CONTROL_TURN, 0.5)
    registry.drop(state="serving")
    text = page.page()
    assert 'pdserve_control_turns_total{outcome="nothing"} 3\n' in text
    assert "pdserve_control_leader 0\n" in text
    assert "pdserve_control_turn_seconds_count 2\n" in text
    assert "pdserve_control_turn_seconds_sum 0.75\n" in text
    assert "pdserve_control_instances" not in text
    assert page.page() == text, "reading it changes nothing"
