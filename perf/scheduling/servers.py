"""The servers that are measured: the policy, and the layout of instances."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import msgspec
from tests.clients import metrics, wait_until
from tests.servers import Running, running

from pdctl.paths import MODEL_REPOSITORY
from pdserve import config
from perf.baselines import policies
from perf.baselines.policies import PolicyName
from perf.serving import BASELINES, MODEL, PROFILES

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
Layout = Literal["pool", "groups", "gateways"]
"""pool: one group of all instances; groups: one for each scenario; gateways: one group, with
several gateways."""

PREFILLS = 2
GATEWAYS = 4
LINKED_S = 30.0
SCENARIOS = ("chat", "documents")
"""Scenarios in the layout of groups; in the other layouts they are unknown, and all requests are
served as one."""


def deployment(layout: Layout) -> config.Deployment:
    """Return a deployment of `PREFILLS` prefills that compute one prompt at a time, and as many
    decodes."""
    names = range(PREFILLS)
    prefill = tuple(f"prefill_{n}" for n in names)
    decode = tuple(f"decode_{n}" for n in names)
    all_in_one = config.Server(name="all", prefill=prefill, decode=decode)
    servers: tuple[config.Server, ...] = (all_in_one,)
    if layout == "gateways":
        worker = msgspec.structs.replace(all_in_one, name="worker", gateway=False)
        servers = (*(config.Server(name=f"gateway_{n}") for n in range(GATEWAYS)), worker)
    scenarios: tuple[config.Scenario, ...] = ()
    if layout == "groups":
        scenarios = tuple(
            config.Scenario(name, (config.Group(name, (prefill[n],), (decode[n],)),))
            for n, name in enumerate(SCENARIOS)
        )
    return config.Deployment(
        model=str(MODEL),
        servers=servers,
        scenarios=scenarios,
        engine=config.Engine(kind="emulated", profile=str(PROFILES / "prefill_100us.yaml")),
        # Room for 65,000 tokens: the cached prefixes of one scenario, but not of two.
        prefill=config.Prefill(slots=2, batch=1, arena_mib=8),
        # Few responses for many tokens, since responses cost most, and prefills are measured.
        decode=config.Decode(blocks=16384, response_cost_ms=20.0, max_interval_ms=200.0),
        gateway=config.Gateway(default_scenario=scenarios[0].name if scenarios else "default"),
    )


def repository(policy: PolicyName, target: Path) -> Path:
    """Return the source of the servers' model repositories.

    For `on_demand` that is pdserve's own; for another policy it is a copy of that in `target`, in
    which the model `scheduler`, which serves the requests, has that policy.
    """
    if policy == "on_demand":
        return MODEL_REPOSITORY
    shutil.copytree(MODEL_REPOSITORY, target, ignore=shutil.ignore_patterns("__pycache__"))
    scheduler = target / "scheduler"
    shutil.copy(BASELINES / "bound_scheduler" / "1" / "model.py", scheduler / "1")
    shutil.copy(policies.__file__, scheduler / "1")
    with (scheduler / "config.pbtxt").open("a") as file:
        file.write(f'parameters {{ key: "policy" value: {{ string_value: "{policy}" }} }}\n')
    return target


@contextlib.contextmanager
def serving(made: config.Deployment, policy: PolicyName = "on_demand") -> Iterator[Running]:
    """Start the servers, and wait until every decode of a group is linked to every prefill of
    it."""
    with tempfile.TemporaryDirectory(prefix="pdserve-perf-") as folder:
        transfer = config.Transfer(key_file=str(Path(folder) / "kv.key"))
        made = msgspec.structs.replace(made, transfer=transfer)
        with running(made, Path(folder), repository(policy, Path(folder) / "source")) as server:
            for gateway in gateways(server):
                wait_until(partial(_linked, gateway), LINKED_S)
            yield server


def _linked(gateway: Running) -> bool:
    """Tell whether its two models, pdserve and scheduler, know every pair of every group."""
    unknown = [
        sample.value
        for sample in metrics(gateway)
        if sample.name == "pdserve_kv_links" and sample.labels["state"] == "unknown"
    ]
    return len(unknown) == 2 * len(gateway.deployment.served) and not any(unknown)


def gateways(server: Running) -> list[Running]:
    """Return each gateway's own addresses."""
    return [
        replace(server, http=one.http, grpc=one.grpc, metrics=one.metrics)
        for one in server.servers
        if one.spec.gateway
    ]


class Offers(NamedTuple):
    """Numbers of offers since the servers started."""

    made: float
    rejected: float

    @classmethod
    def of(cls, server: Running) -> Offers:
        """Read the offers of all gateways, which publish them twice a second."""
        samples = [sample for gateway in gateways(server) for sample in metrics(gateway)]

        def total(name: str) -> float:
            return sum(sample.value for sample in samples if sample.name == name)

        return cls(
            total("pdserve_forward_attempts_total"), total("pdserve_prefill_rejections_total")
        )
