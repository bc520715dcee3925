"""The examination of this host for one deployment."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from pdctl.doctor.advice.advice import Conclusion, advice, conclusion, hindrances
from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.inventory import Inventory
from pdctl.doctor.probe.host import essentials, probe
from pdserve import config
from pdserve.config import Deployment
from pdserve.errors import DeploymentError


class Examination(Struct, frozen=True):
    """The contents of `pdctl doctor --json`."""

    inventory: Inventory
    findings: list[Finding]
    conclusion: Conclusion

    @property
    def json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self)).decode()


def examine(file: Path) -> Examination:
    deployment = config.load(file)
    inventory = probe(deployment)
    findings = advice(inventory, deployment)
    return Examination(inventory, findings, conclusion(inventory, deployment, findings))


def check(deployment: Deployment, names: Collection[str]) -> Iterator[str]:
    """Yield lines that must be printed before servers are started.

    Args:
        names: names of the servers, all of this host.

    Raises:
        DeploymentError: they cannot be started, as `pdctl doctor` finds too; with every reason.
    """
    found = hindrances(essentials(deployment, names), deployment)
    lines = [f"{one.about}: {one.found}; mend: {one.mend}" for one in found]
    problems = [line for one, line in zip(found, lines, strict=True) if one.state == "problem"]
    if problems:
        raise DeploymentError("\n".join(problems))
    yield from lines
