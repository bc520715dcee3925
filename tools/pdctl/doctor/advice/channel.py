"""The finding about the gateways' channel: BLS wants a Triton in which it is mended."""

from __future__ import annotations

from collections.abc import Iterator

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.inventory import Inventory
from pdctl.doctor.versions import BLS, within
from pdserve.config import Deployment


def channel(inventory: Inventory, deployment: Deployment) -> Iterator[Finding]:
    """Return a finding if a gateway of this host calls by BLS in a Triton where that may fail."""
    here = {server.name for server in inventory.servers if server.here}
    gateways = [server for server in deployment.servers if server.gateway and server.name in here]
    triton = inventory.software.triton
    if deployment.gateway.channel != "bls" or not gateways or not triton or within(triton, BLS):
        return
    named = "a Triton of a version not known" if triton == "not known" else f"Triton {triton}"
    yield Finding(
        about="gateway.channel",
        state="note",
        found=f"bls, with {named}; the minimum is 2.71 (release 26.07)",
        used="bls: a gateway may hang or crash when many requests are cancelled at once",
        mend="gateway.channel: grpc, the default; or Triton 2.71 (release 26.07) or later",
    )
