"""Tests for the load of groups, read from metrics pages."""

from __future__ import annotations

from pdserve.config import Decode, Deployment, Group, Scenario, Server
from pdserve.control.cluster import Line
from pdserve.control.loads import Page, loads
from pdserve.control.work import Work

TEXT = """
# HELP pdserve_busy_seconds_total ...
# TYPE pdserve_busy_seconds_total counter
pdserve_busy_seconds_total{instance="p0"} 12.5
pdserve_busy_seconds_total{instance="d0"} 20
pdserve_slot_seconds_total{instance="p0"} 30
pdserve_slot_seconds_total{instance="d0"} 41
pdserve_prefill_seconds_count{instance="p0"} 100
pdserve_prefill_seconds_count{instance="d0"} 7
pdserve_decode_seconds_count{instance="d0"} 90
pdserve_steps_total{instance="d0"} 1000
pdserve_step_sequences_total{instance="d0"} 3000
pdserve_step_sequences_squared_total{instance="d0"} 11000
pdserve_step_sequence_seconds_total{instance="d0"} 60
pdserve_local_prefill_seconds_sum{instance="d0"} 5
pdserve_kv_leases{instance="p0",state="leased"} 3
pdserve_kv_leases{instance="p0",state="cached"} 55
pdserve_waiting_requests{gateway="pdserve",group="chat",role="prefill"} 4
pdserve_waiting_requests{gateway="scheduler",group="chat",role="prefill"} 2
pdserve_waiting_requests{gateway="pdserve",group="chat",role="decode"} 1
pdserve_waiting_requests{gateway="pdserve",group="code",role="prefill"} 9
pdserve_oldest_waiting_seconds{gateway="pdserve",group="chat",role="prefill"} 1.5
pdserve_oldest_waiting_seconds{gateway="pdserve",group="chat",role="decode"} 2.5
pdserve_routed_requests_total{scenario="chat",group="chat"} 400
nv_inference_count{model="pdserve",version="1"} 1
"""
SERVERS = (
    Server("front"),
    Server("other"),
    Server("work", gateway=False, prefill=("p0",), decode=("d0",)),
)
DEPLOYMENT = Deployment(
    "m",
    SERVERS,
    decode=Decode(slots=4),
    scenarios=(Scenario("chat", (Group("chat", ("p0",), ("d0",)),)),),
)


def test_a_page_says_what_an_instance_has_counted_in_its_role() -> None:
    page = Page(TEXT)
    prefill = page.counters("p0", "prefill", 3)
    assert (prefill.number, prefill.leased) == (3, 3.0)
    assert prefill.work == Work(completed=100, busy_s=12.5, slot_s=30)
    decode = page.counters("d0", "decode", 1).work
    assert decode == Work(90, 15.0, 41, 1000, 3000, 11000, 60), "without prompts of its own"
    assert page.counters("never", "decode", 1).work == Work()


def test_a_page_says_what_waits_at_its_gateways() -> None:
    page = Page(TEXT)
    assert page.line("chat") == Line(waiting=6, waiting_decode=1, oldest_s=2.5, routed=400)
    assert page.line("never") == Line(0, 0, 0, 0)


def test_a_server_that_does_not_answer_is_unknown() -> None:
    members = [("p0", "chat", "prefill", 3), ("d0", "chat", "decode", 1)]
    page = Page(TEXT)
    found = loads(DEPLOYMENT, {"front": page, "other": None, "work": page}, members, 5.0)
    assert found["chat"].at == 5.0
    assert found["chat"].gateways == {"front": page.line("chat"), "other": None}
    assert found["chat"].instances == {
        "p0": page.counters("p0", "prefill", 3),
        "d0": page.counters("d0", "decode", 1),
    }
    found = loads(DEPLOYMENT, {"front": page}, members, 5.0)
    assert found["chat"].instances == {"p0": None, "d0": None}
    assert found["chat"].gateways["other"] is None


def test_what_is_no_number_is_left_out() -> None:
    page = Page('pdserve_busy_seconds_total{instance="p0"} many\npdserve_steps_total{ 3\n')
    assert page.counters("p0", "prefill", 1).work == Work()
