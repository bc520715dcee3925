"""Every metric of gateways and instances, declared once; docs/metrics.md lists the same.

Names follow Prometheus: a counter ends in ``_total``, and the unit is part of the name.
"""

from __future__ import annotations

from typing import Any

from pdserve.observability.metrics import Counter, Gauge, Histogram, Metric, Summary

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


# The labels of metrics are made by functions, since making a named tuple for each count takes far
# longer.


def _none() -> tuple[()]:
    return ()


def _scenario(scenario: str) -> tuple[str]:
    return (scenario,)


def _scenario_outcome(scenario: str, outcome: str) -> tuple[str, str]:
    return scenario, outcome


def _scenario_group(scenario: str, group: str) -> tuple[str, str]:
    return scenario, group


def _scenario_group_source(scenario: str, group: str, source: str) -> tuple[str, str, str]:
    return scenario, group, source


def _gateway(gateway: str) -> tuple[str]:
    return (gateway,)


def _gateway_outcome(gateway: str, outcome: str) -> tuple[str, str]:
    return gateway, outcome


def _group_state(gateway: str, group: str, state: str) -> tuple[str, str, str]:
    return gateway, group, state


def _group_role(gateway: str, group: str, role: str) -> tuple[str, str, str]:
    return gateway, group, role


def _phase_reason(phase: str, reason: str) -> tuple[str, str]:
    return phase, reason


def _instance(instance: str) -> tuple[str]:
    return (instance,)


def _instance_state(instance: str, state: str) -> tuple[str, str]:
    return instance, state


def _instance_type(instance: str, type: str) -> tuple[str, str]:  # noqa: A002 - a label's name
    return instance, type


def _transport(transport: str) -> tuple[str]:
    return (transport,)


def _transport_reason(transport: str, reason: str) -> tuple[str, str]:
    return transport, reason


def _strategy(strategy: str) -> tuple[str]:
    return (strategy,)


def _what(what: str) -> tuple[str]:
    return (what,)


def _outcome(outcome: str) -> tuple[str]:
    return (outcome,)


def _group_role_state(group: str, role: str, state: str) -> tuple[str, str, str]:
    return group, role, state


def _link(prefill: str, decode: str, transport: str, detail: str) -> tuple[str, str, str, str]:
    return prefill, decode, transport, detail


# Requests, counted by gateways.
REQUESTS = Counter(
    "pdserve_requests_total",
    _scenario_outcome,
    "requests",
    "A request is counted when it ends, by its outcome: stop, length, rejected, expired, cancelled "
    "or failed.",
)
GOOD_REQUESTS = Counter(
    "pdserve_good_requests_total",
    _scenario,
    "requests",
    "A request is counted if it was answered within the limits of its scenario (goodput).",
)
ROUTED_REQUESTS = Counter(
    "pdserve_routed_requests_total",
    _scenario_group,
    "requests",
    "A request is counted when it is sent to a group.",
)
UNKNOWN_SCENARIO_REQUESTS = Counter(
    "pdserve_unknown_scenario_requests_total",
    _none,
    "requests",
    "A request is counted if it names a scenario that does not exist and is served by the default.",
)
OPEN_REQUESTS = Gauge(
    "pdserve_open_requests",
    _gateway,
    "requests",
    "The gateway has this many requests in flight.",
)
TTFT = Histogram(
    "pdserve_ttft_seconds",
    _scenario_group,
    "seconds",
    "This is the time from a request's arrival to its first token.",
    SECONDS,
)
TPOT = Histogram(
    "pdserve_tpot_seconds",
    _scenario_group,
    "seconds",
    "This is the mean time per output token of a request after its first token.",
    SECONDS,
)
E2E = Histogram(
    "pdserve_e2e_seconds",
    _scenario_group,
    "seconds",
    "This is the time from a request's arrival to its last token.",
    SECONDS,
)

PROMPT_TOKENS = Counter(
    "pdserve_prompt_tokens_total",
    _scenario_group_source,
    "tokens",
    "The prompt tokens of finished requests are summed by their source: cached if their K and V "
    "were there already, computed otherwise.",
)
OUTPUT_TOKENS = Counter(
    "pdserve_output_tokens_total",
    _scenario_group,
    "tokens",
    "The tokens of answers are summed, those of answers that did not finish included.",
)

# Forwarding, counted by gateways.
WAITING_REQUESTS = Gauge(
    "pdserve_waiting_requests",
    _group_role,
    "requests",
    "This many requests wait at the gateway for an instance of this role.",
)
OLDEST_WAITING = Gauge(
    "pdserve_oldest_waiting_seconds",
    _group_role,
    "seconds",
    "The request that waits longest at the gateway for an instance of this role has waited this "
    "long; 0: none waits.",
)
FORWARD_ATTEMPTS = Counter(
    "pdserve_forward_attempts_total",
    _none,
    "offers",
    "Each offer of a request to a prefill is counted, whether it is accepted or not.",
)
PREFILL_REJECTIONS = Counter(
    "pdserve_prefill_rejections_total",
    _instance,
    "offers",
    "An offer to a prefill is counted if the prefill rejected it because it was busy.",
)
DECODE_REJECTIONS = Counter(
    "pdserve_decode_rejections_total",
    _instance,
    "offers",
    "An offer to a decode is counted if the decode rejected it because it was full.",
)
RETRIES = Counter(
    "pdserve_retries_total",
    _phase_reason,
    "retries",
    "A retry is counted by phase (offer, prefill, decode) and reason: error if an instance failed, "
    "busy if no decode had room for a computed prompt in time, drained if an instance has left.",
)
RELOADS = Counter(
    "pdserve_reloads_total",
    _gateway_outcome,
    "reloads",
    "A changed deployment is counted by what the gateway did with it: applied or refused.",
)

# Instances, counted by themselves.
UNSEALED_MESSAGES = Counter(
    "pdserve_unsealed_messages_total",
    _instance,
    "messages",
    "A message to an instance is counted if it was not sealed with the key of the deployment.",
)
STEPS = Counter(
    "pdserve_steps_total",
    _instance,
    "steps",
    "Each forward of a prefill and each step of a decode is counted.",
)
STEP_SEQUENCES = Counter(
    "pdserve_step_sequences_total",
    _instance,
    "sequences",
    "The sequences in each step of a decode are summed; divided by the steps they are the mean "
    "batch.",
)
STEP_SEQUENCES_SQUARED = Counter(
    "pdserve_step_sequences_squared_total",
    _instance,
    "sequences squared",
    "The squares of the numbers of sequences in each step of a decode are summed.",
)
STEP_SEQUENCE_SECONDS = Counter(
    "pdserve_step_sequence_seconds_total",
    _instance,
    "seconds",
    "The time of each step of a decode is summed, multiplied by its number of sequences.",
)
SLOTS = Gauge(
    "pdserve_slots",
    _instance_state,
    "slots",
    "The instance has this many slots in this state: used or free.",
)
SLOT_SECONDS = Counter(
    "pdserve_slot_seconds_total",
    _instance,
    "seconds",
    "The times for which requests hold a slot of the instance are summed while they hold it.",
)
BUSY_SECONDS = Counter(
    "pdserve_busy_seconds_total",
    _instance,
    "seconds",
    "The time is summed in which the instance's engine computes, whatever the size of its batch.",
)
PREFILL = Summary(
    "pdserve_prefill_seconds",
    _instance,
    "seconds",
    "This is the time in which a prefill computed one prompt, waiting and transfer apart.",
)
DECODE = Summary(
    "pdserve_decode_seconds",
    _instance,
    "seconds",
    "This is the time from the moment at which a decode had a prompt's KV cache to the end of its "
    "answer.",
)
SLOT_WATCHES = Gauge(
    "pdserve_slot_watches",
    _instance,
    "gateways",
    "This many gateways wait until the instance has a free slot.",
)
LOCAL_PREFILL = Histogram(
    "pdserve_local_prefill_seconds",
    _instance,
    "seconds",
    "This is the time in which a decode computed one prompt itself.",
    SECONDS,
)

# KV caches, counted by the instances that hold or pull them.
KV_LEASES = Gauge(
    "pdserve_kv_leases",
    _instance_state,
    "KV caches",
    "The prefill holds this many KV caches in this state: allocated, leased, in_transfer, "
    "quarantined or cached; with TensorRT-LLM computing, answered, waiting or pinned.",
)
KV_BLOCKS = Gauge(
    "pdserve_kv_blocks",
    _instance_state,
    "blocks",
    "The block pool has this many blocks in this state: used, cached or free.",
)
KV_EVENTS = Counter(
    "pdserve_kv_events_total",
    _instance_type,
    "events",
    "A change of TensorRT-LLM's own block pool is counted by its type, if the engine reports it.",
)
KV_TRANSFERS = Counter(
    "pdserve_kv_transfers_total",
    _strategy,
    "KV caches",
    "A KV cache that a decode has pulled is counted by strategy: whole, direct or layered.",
)
KV_TRANSFER_BYTES = Counter(
    "pdserve_kv_transfer_bytes_total",
    _transport,
    "bytes",
    "The bytes of KV caches that decodes have pulled are summed by transport.",
)
KV_TRANSFER = Histogram(
    "pdserve_kv_transfer_seconds",
    _none,
    "seconds",
    "This is the time in which a decode pulled one KV cache.",
    SECONDS,
)
KV_TRANSFER_EXPOSED = Histogram(
    "pdserve_kv_transfer_exposed_seconds",
    _none,
    "seconds",
    "This is the part of a pull that came after the last layer had been computed.",
    SECONDS,
)

# KV links: their number, counted by gateways, and their properties, measured by decodes.
KV_LINKS = Gauge(
    "pdserve_kv_links",
    _group_state,
    "links",
    "The group has this many pairs of a prefill and a decode with a KV link in this state: "
    "connected, refused, or unknown as long as nobody has answered.",
)
KV_LINK_SECONDS = Histogram(
    "pdserve_kv_link_connect_seconds",
    _transport_reason,
    "seconds",
    "A decode took this time to connect to a prefill, by the link's transport and the reason: "
    "planned; on_demand, while a prompt was computed; or request, if a request waited for it.",
    SECONDS,
)
KV_LINK_RATE = Gauge(
    "pdserve_kv_link_bytes_per_second",
    _link,
    "bytes per second",
    "The decode read the prefill's memory at this rate when it probed the link.",
)
KV_LINK_LATENCY = Gauge(
    "pdserve_kv_link_latency_seconds",
    _link,
    "seconds",
    "The decode took this time to read one word of the prefill's memory when it probed the link.",
)
KV_LINK_FALLBACK = Gauge(
    "pdserve_kv_link_fallback",
    _link,
    "0 or 1",
    "This is 1 if the decode reaches the prefill over a network without RDMA.",
)

# The controller, at a port of its own.
CONTROL_LEADER = Gauge(
    "pdserve_control_leader",
    _none,
    "0 or 1",
    "This is 1 if this controller leads; of all controllers of a deployment one does.",
)
CONTROL_STORE_AGE = Gauge(
    "pdserve_control_store_age_seconds",
    _none,
    "seconds",
    "The store has answered this controller so long ago; -1: it has not, or it does not lead.",
)
CONTROL_GENERATION = Gauge(
    "pdserve_control_generation",
    _none,
    "writes",
    "Desired state has been written this many times.",
)
CONTROL_EVENTS = Counter(
    "pdserve_control_events_total",
    _what,
    "events",
    "An event is counted by what it was, as `pdctl events` names it; hold says why a ratio is not "
    "changed.",
)
CONTROL_INSTANCES = Gauge(
    "pdserve_control_instances",
    _group_role_state,
    "instances",
    "The group has this many instances of this role in this state: desired, or serving, which is "
    "those of them that say so.",
)
CONTROL_TURNS = Counter(
    "pdserve_control_turns_total",
    _outcome,
    "turns",
    "A look at the store is counted by its outcome: nothing was to be written, written, fenced (it "
    "had changed meanwhile, or another one leads), unreachable, or failed.",
)
CONTROL_TURN = Summary(
    "pdserve_control_turn_seconds",
    _none,
    "seconds",
    "This is the time of one look at the store, with the decision and its write.",
)
CONTROL_SCRAPES = Counter(
    "pdserve_control_scrapes_total",
    _outcome,
    "pages",
    "A metrics page of a server is counted by its outcome: read, or unknown if the server did not "
    "answer.",
)

METRICS: dict[str, Metric[Any]] = {
    metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)
}
