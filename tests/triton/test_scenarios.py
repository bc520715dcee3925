"""Tests for scenarios and groups on a real server: routing, limits, shares, reload."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import tritonclient.grpc as grpc

from pdctl.paths import MODEL_REPOSITORY
from pdserve import config
from pdserve.observability.catalogue import METRICS
from pdserve.observability.metrics import Gauge
from tests.clients import (
    Answer,
    Refused,
    ask,
    connected,
    generate,
    metrics,
    stream,
    tensor,
    wait_counted,
    wait_idle,
    wait_until,
)
from tests.servers import Running, default_deployment, emulated_deployment, running
from tests.triton.test_launcher import DRIVER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.triton

SCENARIOS = (
    config.Scenario(
        "chat",
        (
            config.Group("chat_a", ("prefill_0",), ("decode_0",), share=2),
            config.Group("chat_b", ("prefill_1",), ("decode_1",)),
        ),
    ),
    config.Scenario(
        "code",
        (config.Group("code", ("prefill_2",), ("decode_2",)),),
        rules=(
            config.Rule(prefix="def "),
            config.Rule(tenant="acme"),
            config.Rule(model="scheduler", tenant="night"),
            config.Rule(model="ensemble", tenant="dusk"),
        ),
        max_tokens=5,
        ttft_limit_ms=300,
        tpot_limit_ms=0.001,
        shared_prefixes=True,
    ),
)
MEMBERS = {group.name: (group.prefill, group.decode) for one in SCENARIOS for group in one.groups}


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """Three groups of two scenarios; 1 ms per prompt token and per step. Its file is restored."""
    yield shared
    if config.load(deployment_file(shared)) != shared.deployment:
        change(shared)
    wait_idle(shared, 3)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("scenarios")
    deployment = emulated_deployment(
        folder,
        {"prefill": {"per_token_ms": 1}, "decode": {"base_ms": 1}},
        instances=3,
        prefill=config.Prefill(arena_mib=16),
        gateway=config.Gateway(default_scenario="chat"),
        scenarios=SCENARIOS,
    )
    with running(deployment, folder) as server:
        yield server


def deployment_file(server: Running) -> Path:
    """Return the deployment file that the server's models read."""
    return server.servers[0].repository / "deployment.yaml"


def put(server: Running, data: bytes) -> None:
    new = deployment_file(server).with_name("new")
    new.write_bytes(data)
    new.replace(deployment_file(server))


def counted(server: Running, name: str, label: str = "", **labels: str) -> Counter[str]:
    """Return a counter's values by one of its labels."""
    found: Counter[str] = Counter()
    for sample in metrics(server):
        if sample.name == name and labels.items() <= sample.labels.items():
            found[sample.labels.get(label, "")] += round(sample.value)
    return found


def reloads(server: Running) -> Counter[str]:
    return counted(server, "pdserve_reloads_total", "outcome")


def change(server: Running, **fields: Any) -> None:
    """Write another deployment, and wait until both gateways have applied it."""
    applied = reloads(server)["applied"]
    put(server, msgspec.yaml.encode(msgspec.structs.replace(server.deployment, **fields)))
    wait_until(lambda: reloads(server)["applied"] == applied + 2, 5, lambda: log(server)[-500:])


def log(server: Running) -> str:
    return server.servers[0].read_log()


def group_of(answer: Answer) -> str:
    """Return the group whose instances have served it."""
    stats = answer.stats
    prefills, decodes = MEMBERS[stats["group"]]
    assert stats["prefill"] in prefills
    assert stats["decode"] in (*decodes, "")
    group: str = stats["group"]
    return group


# ------------------------------------------------------------------------------------------ routing


@pytest.mark.parametrize(
    ("fields", "group"),
    [
        ({}, "chat"),
        ({"scenario": "code"}, "code"),
        ({"parameters": {"scenario": "code"}}, "code"),
        ({"scenario": "chat", "tenant": "acme"}, "chat"),
        ({"scenario": "prose", "tenant": "acme"}, "chat"),
        ({"tenant": "acme"}, "code"),
        ({"parameters": {"tenant": "acme"}}, "code"),
        ({"tenant": "night"}, "chat"),
        ({"text_input": "def f(x):"}, "code"),
        ({"text_input": "Def f(x):"}, "chat"),
        ({"text_input": "def f(x):", "chat": True}, "code"),
    ],
)
@pytest.mark.parametrize("model", ["pdserve", "ensemble"])
def test_by_label_rule_or_default(
    server: Running, model: str, fields: dict[str, Any], group: str
) -> None:
    answer = generate(server, model, **{"text_input": "Hello", "max_tokens": 2, **fields})
    assert group_of(answer).startswith(group)


def test_rules_see_the_model_that_was_asked(server: Running) -> None:
    def group(model: str) -> str:
        return group_of(generate(server, model, text_input="a", tenant="dusk", max_tokens=2))

    assert group("ensemble") == "code"
    assert group("pdserve").startswith("chat")


@pytest.mark.parametrize("model", ["pdserve", "ensemble"])
def test_a_conversation_is_known_by_its_first_turn(server: Running, model: str) -> None:
    def conversation(*contents: str) -> str:
        roles = ("system", "user")
        turns = zip(roles, contents, strict=True)
        return json.dumps([{"role": role, "content": content} for role, content in turns])

    for contents, group in ((("def x", "Hello"), "code"), (("Hello", "def x"), "chat")):
        asked = {"text_input": conversation(*contents), "chat": True, "max_tokens": 2}
        assert group_of(generate(server, model, **asked)).startswith(group)


def test_token_ids_are_routed_by_all_but_the_prefix(server: Running) -> None:
    def group(**fields: Any) -> str:
        return group_of(generate(server, "scheduler", input_ids=[5] * 8, max_tokens=2, **fields))

    assert group().startswith("chat")
    assert group(scenario="code") == group(tenant="night") == group(tenant="acme") == "code"


def test_shares(server: Running) -> None:
    answers = [generate(server, text_input=f"{n}", max_tokens=2) for n in range(9)]
    assert Counter(map(group_of, answers)) == {"chat_a": 6, "chat_b": 3}


def test_unknown_labels_are_counted_or_refused(server: Running) -> None:
    wait_counted()
    before = counted(server, "pdserve_unknown_scenario_requests_total").total()
    generate(server, text_input="Hello", scenario="prose")
    wait_until(
        lambda: counted(server, "pdserve_unknown_scenario_requests_total").total() == before + 1, 2
    )
    change(server, gateway=config.Gateway(default_scenario="chat", strict=True))
    wait_counted()
    refused = counted(server, "pdserve_requests_total", "outcome", scenario="chat")["rejected"]
    with pytest.raises(Refused) as caught:
        generate(server, text_input="Hello", scenario="prose")
    assert str(caught.value) == ("NOT_FOUND: scenario: 'prose' is unknown; there are: chat, code")
    wait_until(
        lambda: (
            counted(server, "pdserve_requests_total", "outcome", scenario="chat")["rejected"]
            == refused + 1
        ),
        2,
    )


# ------------------------------------------------------------------------------ terms of a scenario


def test_a_scenario_says_what_the_client_does_not(server: Running) -> None:
    def tokens(**fields: Any) -> int:
        answer = generate(server, text_input="Hello", ignore_eos=True, **fields)
        length: int = answer.stats["output_tokens"]
        return length

    assert tokens(scenario="code") == 5
    assert tokens(scenario="code", max_tokens=7) == 7
    assert tokens() == 128


def test_ttft_limit_of_a_scenario(server: Running) -> None:
    asked = {"input_ids": [7] * 400, "max_tokens": 2}
    with pytest.raises(Refused, match=r"UNAVAILABLE: .*TTFT limit of 300 ms"):
        generate(server, "scheduler", scenario="code", **asked)
    generate(server, "scheduler", scenario="code", ttft_limit_ms=5000, **asked)
    generate(server, "scheduler", scenario="chat", **asked)


@pytest.mark.alone
@pytest.mark.parametrize("route", ["grpc", "generate"])
def test_tritons_own_timeout_limits_the_whole_answer(server: Running, route: str) -> None:
    """It is in microseconds; `generate` passes it as a parameter, gRPC as the request's timeout."""
    asked = {"text_input": "Hello", "max_tokens": 4000, "ignore_eos": True}
    began = time.monotonic()
    if route == "generate":
        with pytest.raises(Refused) as caught:
            generate(server, parameters={"timeout": 300_000}, **asked)
        error: object = caught.value
    else:
        answers: queue.Queue[tuple[object, object]] = queue.Queue()
        with closing(grpc.InferenceServerClient(server.grpc)) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            inputs = [tensor(name, value) for name, value in asked.items()]
            client.async_stream_infer("pdserve", inputs, timeout=300_000)
            _, error = answers.get(timeout=10)
    assert 0.3 <= time.monotonic() - began < 1
    assert "UNAVAILABLE: the request's own time limit has passed" in str(error)
    wait_idle(server, 1)


def test_metrics_say_scenario_and_group(server: Running) -> None:
    def seen() -> list[Counter[str]]:
        return [
            counted(server, "pdserve_requests_total", "scenario", outcome="length"),
            counted(server, "pdserve_routed_requests_total", "group"),
            counted(server, "pdserve_good_requests_total", "scenario"),
        ]

    wait_counted()
    before = seen()
    for scenario in ("code", "chat", "code"):
        generate(server, text_input="Hello", max_tokens=3, scenario=scenario, ignore_eos=True)
    wait_until(lambda: (seen()[0] - before[0]).total() == 3, 2)
    ended, routed, good = (now - then for now, then in zip(seen(), before, strict=True))
    assert ended == {"chat": 1, "code": 2}
    assert routed["code"] == 2
    assert routed.total() == 3
    assert good == {"chat": 1}, "1 ms per token exceeds the limit of scenario code"


def test_tenants_share_prefixes_where_the_scenario_says_so(server: Running) -> None:
    """vllm#29906 and others: they never share unless the deployment says so."""
    change(server, scenarios=tuple(without_shares(SCENARIOS)))
    for scenario, shared in (("code", True), ("chat", False)):
        asked = {"input_ids": list(range(100, 228)), "max_tokens": 2, "scenario": scenario}
        cached = [
            generate(server, "scheduler", tenant=tenant, **asked).stats["cached_tokens"]
            for tenant in ("one", "two", "two")
        ]
        assert cached[0] == 0
        assert (cached[1] > 0) is shared
        assert cached[2] > 0


def without_shares(scenarios: tuple[config.Scenario, ...]) -> Iterator[config.Scenario]:
    """Send all traffic of each scenario to its first group."""
    for scenario in scenarios:
        first, *others = scenario.groups
        idle = (msgspec.structs.replace(group, share=0.0) for group in others)
        yield msgspec.structs.replace(scenario, groups=(first, *idle))


def test_sampling_of_a_scenario(tmp_path: Path) -> None:
    """On the torch engine, each value that the client leaves out is the scenario's."""
    deployment = msgspec.structs.replace(
        default_deployment("torch"),
        engine=config.Engine(threads=1),
        scenarios=(
            config.Scenario("default", (config.Group("a", ("prefill_0",), ("decode_0",)),)),
            config.Scenario(
                "warm",
                (config.Group("b", ("prefill_1",), ("decode_1",)),),
                sampling=config.SamplingDefaults(temperature=1.8, top_k=500),
            ),
        ),
    )
    with running(deployment, tmp_path) as server:

        def text(**fields: Any) -> str:
            return generate(server, text_input="The sea is", max_tokens=6, **fields).text

        greedy = text()
        warm = text(seed=7, temperature=1.8, top_k=500)
        assert warm != greedy
        assert text(scenario="warm", seed=7) == warm
        assert text(scenario="warm", seed=7, temperature=0.0) == greedy
        assert text(scenario="warm", seed=7, top_k=1) == greedy


# ------------------------------------------------------------------------------------------- reload


def test_a_changed_file_is_taken_over_within_seconds(server: Running) -> None:
    chat, code = SCENARIOS
    change(
        server,
        scenarios=(
            msgspec.structs.replace(chat, rules=(config.Rule(tenant="acme"),), max_tokens=3),
            msgspec.structs.replace(code, name="programs", max_tokens=9),
        ),
    )
    answer = generate(server, text_input="Hello", tenant="acme")
    assert group_of(answer).startswith("chat")
    assert answer.stats["output_tokens"] == 3
    answer = generate(server, text_input="Hello", scenario="programs", ignore_eos=True)
    assert (group_of(answer), answer.stats["output_tokens"]) == ("code", 9)
    assert "deployment: taken over: scenarios.chat.rules: [] -> " in log(server)


def links(server: Running, group: str) -> list[float]:
    """Return the number of links in a group that each gateway has made."""
    return [
        sample.value
        for sample in metrics(server)
        if sample.name == "pdserve_kv_links"
        if (sample.labels["group"], sample.labels["state"]) == (group, "connected")
    ]


def test_a_stream_goes_on_where_it_is_while_its_instances_move(server: Running) -> None:
    """decode_0 moves to the other scenario, and finishes what it has begun."""
    chat, code = SCENARIOS
    (a, b), (c,) = chat.groups, code.groups
    both = config.Group("code", (*c.prefill, *a.prefill), (*c.decode, *a.decode))
    moved = (
        msgspec.structs.replace(chat, groups=(b,)),
        msgspec.structs.replace(code, groups=(both,)),
    )

    async def run() -> tuple[Answer, Answer, list[Answer]]:
        async with connected(server) as client:
            asked = {"input_ids": [9] * 8, "max_tokens": 4000, "ignore_eos": True}
            parts = []
            going = stream(client, "scheduler", scenario="chat", stream=True, **asked)
            async for part in going:
                parts.append(part)
                if len(parts) == 5:
                    break
            await asyncio.to_thread(change, server, scenarios=moved)
            # An instance that joins a group is used once its links are made.
            await asyncio.to_thread(wait_until, lambda: links(server, "code") == [4, 4], 5.0)
            new = await asyncio.gather(
                *(ask(client, text_input=f"def {n}", max_tokens=40) for n in range(8))
            )
            parts += [part async for part in going]
            whole = await ask(client, "scheduler", scenario="chat", **asked)
            return Answer(parts), whole, new

    answer, whole, new = asyncio.run(run())
    assert (answer.stats["group"], answer.stats["decode"]) == ("chat_a", "decode_0")
    assert len(answer.ids) == 4000
    assert answer.ids == whole.ids
    assert whole.stats["group"] == "chat_b"
    assert {one.stats["decode"] for one in new} == {"decode_0", "decode_2"}
    assert {one.stats["group"] for one in new} == {"code"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "while parsing"),
        ("servers: []", "servers"),
        ("scenarios: [{name: chat, groups: []}]", "scenarios"),
    ],
)
def test_a_file_with_an_error_is_refused(server: Running, text: str, message: str) -> None:
    refused = reloads(server)["refused"]
    put(server, text.encode())
    wait_until(lambda: reloads(server)["refused"] == refused + 2, 5)
    words = log(server).rpartition("refused, the old one stays: ")[2]
    assert message in words.splitlines()[0]
    assert group_of(generate(server, text_input="Hello", scenario="code")) == "code"
    put(server, msgspec.yaml.encode(server.deployment))


def pdctl_reload(server: Running, folder: Path, *options: str, **fields: Any) -> tuple[int, str]:
    """Run `pdctl reload` with other fields; return its status and its output."""
    file = folder / "deployment.yaml"
    wanted = msgspec.structs.replace(server.deployment, **fields)
    file.write_bytes(msgspec.yaml.encode(wanted))
    run = server.servers[0].folder.parent
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, run, MODEL_REPOSITORY, "reload", *options, "-f", file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


def test_pdctl_reload(server: Running, tmp_path: Path) -> None:
    chat, code = SCENARIOS
    wanted: dict[str, Any] = {
        "scenarios": (chat, msgspec.structs.replace(code, max_tokens=6)),
        "prefill": config.Prefill(slots=9),
    }
    said = (
        "taken over by local:\n"
        "  scenarios.code.max_tokens: 5 -> 6\n"
        "waits for a restart of local:\n"
        "  prefill.slots: 8 -> 9\n"
        "  prefill.arena_mib: 16 -> 512\n"
    )

    def tokens() -> int:
        answer = generate(server, text_input="Hello", scenario="code", ignore_eos=True)
        length: int = answer.stats["output_tokens"]
        return length

    assert pdctl_reload(server, tmp_path, "--check", **wanted) == (0, f"would be {said}")
    assert tokens() == 5
    assert pdctl_reload(server, tmp_path, **wanted) == (0, said)
    assert tokens() == 6, "it ends when every gateway has applied it"
    assert pdctl_reload(server, tmp_path) == (
        0,
        "taken over by local:\n  scenarios.code.max_tokens: 6 -> 5\n",
    )
    assert pdctl_reload(server, tmp_path) == (0, "nothing changes in the running servers\n")


def test_pdctl_reload_refuses_a_file_with_an_error(server: Running, tmp_path: Path) -> None:
    code, said = pdctl_reload(server, tmp_path, gateway=config.Gateway(default_scenario="prose"))
    assert code == 1
    assert "default_scenario: prose is none of: chat, code" in said
    assert group_of(generate(server, text_input="Hello", scenario="code")) == "code"


def test_pdctl_reload_names_servers_that_come_go_and_change(
    server: Running, tmp_path: Path
) -> None:
    (local,) = server.deployment.servers
    more = config.Server(name="more", http_port=1, grpc_port=2, metrics_port=3)
    moved = msgspec.structs.replace(local, metrics_port=4)
    _, said = pdctl_reload(server, tmp_path, "--check", servers=(moved, more))
    restart = (
        "local has to be restarted, since its own ports or instances change; gateways use the new "
        "ones from the reload on"
    )
    assert said.splitlines() == [
        "would be taken over by local:",
        "  servers.more: added",
        "waits for a restart of local:",
        f"  servers.local.metrics_port: {local.metrics_port} -> 4",
        restart,
        "more does not run on this machine",
    ]


def test_what_waits_for_a_restart_is_said(server: Running) -> None:
    change(server, prefill=config.Prefill(slots=9), decode=config.Decode(slots=9))
    words = log(server).rpartition("waits for a restart: ")[2].splitlines()[0]
    assert "prefill.slots: 8 -> 9" in words
    assert "decode.slots: 64 -> 9" in words
    generate(server, text_input="Hello")


def test_gauges_of_what_is_gone_vanish(server: Running) -> None:
    """Those of a group that the deployment lacks, and of an instance whose model is unloaded."""
    names = {metric.name for metric in METRICS.values() if isinstance(metric, Gauge)}

    def shown(**labels: str) -> set[str]:
        found = (sample for sample in metrics(server) if labels.items() <= sample.labels.items())
        return names & {sample.name for sample in found}

    generate(server, text_input="Hello", scenario="code")
    wait_until(lambda: "pdserve_waiting_requests" in shown(group="code"), 2)
    wait_until(lambda: "pdserve_kv_link_latency_seconds" in shown(decode="decode_2"), 2)
    host = server.servers[0]
    fewer = msgspec.structs.replace(
        server.deployment.servers[0],
        prefill=("prefill_0", "prefill_1"),
        decode=("decode_0", "decode_1"),
    )
    change(server, servers=(fewer,), scenarios=SCENARIOS[:1])
    wait_until(lambda: not shown(group="code"), 5, lambda: str(shown(group="code")))
    assert shown(group="chat_a")
    host.unload("decode_2")  # which the gateways have let go of, so that its process ends
    try:
        wait_until(lambda: not shown(instance="decode_2") | shown(decode="decode_2"), 5)
        assert shown(instance="decode_1")
    finally:
        host.load("decode_2", 60)
    wait_until(lambda: "pdserve_slots" in shown(instance="decode_2"), 5)
