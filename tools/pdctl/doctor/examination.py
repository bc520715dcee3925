"""This host, looked at for one deployment."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from pdctl.doctor.advice.advice import Conclusion, advice, conclusion
from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.inventory import Inventory
from pdctl.doctor.probe.host import probe
from pdserve import config


class Examination(Struct, frozen=True):
    """As `pdctl doctor --json` prints it."""

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
