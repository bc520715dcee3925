"""The way without flexible instances: unload the model, replace it in the repository, load it."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from pathlib import Path

import msgspec

from pdctl.paths import MODEL_REPOSITORY
from pdctl.reload import Reload
from pdctl.repository import render
from pdctl.server import Server
from pdserve.config import Deployment, Role
from pdserve.rpc.messages import Inspect, Inspected
from perf.role_switch.site import FIXED, Site

UNLOAD_S, LOAD_S, EMPTY_S = 60.0, 120.0, 60.0


async def load_anew(site: Site, role: Role) -> float:
    """Give the fixed instance another role by loading it; return the time at which it was empty.

    It is taken out of the deployment first, so that gateways offer it nothing; once it holds
    nothing, it is unloaded, replaced and loaded, and put into the deployment again.

    Raises:
        RuntimeError: a step takes too long.
    """
    await _reload(site, None)
    await _until_empty(site)
    await site.disconnect(FIXED)
    empty_at = asyncio.get_running_loop().time()
    await asyncio.to_thread(_replace, site.server(FIXED), role)
    await _reload(site, role)
    return empty_at


async def _reload(site: Site, role: Role | None) -> None:
    """Give all servers a deployment with the instance in a role, or without it."""
    wanted = _with(site.servers[0].running, role)
    reloads = []
    for server in site.servers:
        spec = next(spec for spec in wanted.servers if spec.name == server.spec.name)
        one = Server(wanted, spec, server.folder.parent)
        reloads.append(Reload(one))
        reloads[-1].begin()
    for reload in reloads:
        await asyncio.to_thread(reload.wait)


def _with(deployment: Deployment, role: Role | None) -> Deployment:
    servers = []
    for number, server in enumerate(deployment.servers):
        roles: dict[str, tuple[str, ...]] = {
            one: tuple(name for name in getattr(server, one) if name != FIXED)
            for one in ("prefill", "decode")
        }
        if number == 0 and role is not None:
            roles[role] += (FIXED,)
        servers.append(msgspec.structs.replace(server, **roles))
    return msgspec.structs.replace(deployment, servers=tuple(servers))


async def _until_empty(site: Site) -> None:
    deadline = time.monotonic() + EMPTY_S
    while time.monotonic() < deadline:
        call = uuid.uuid4().hex
        found = await site.channel(FIXED).open(call, Inspect(call)).get(EMPTY_S)
        if isinstance(found, Inspected) and not (found.used or found.leases):
            return
        await asyncio.sleep(0.02)
    raise RuntimeError(f"{FIXED} is not empty after {EMPTY_S:g} s")


def _replace(server: Server, role: Role) -> None:
    server.unload(FIXED)
    deadline = time.monotonic() + UNLOAD_S
    while server.index().get(FIXED) != "UNAVAILABLE":
        if time.monotonic() > deadline:
            raise RuntimeError(f"{FIXED} is not unloaded after {UNLOAD_S:g} s")
        time.sleep(0.05)
    aside = server.folder / "aside"
    wanted = _with(server.running, role)
    spec = next(spec for spec in wanted.servers if spec.name == server.spec.name)
    render(wanted, spec, Path(MODEL_REPOSITORY), aside)
    shutil.rmtree(server.repository / FIXED)
    (aside / FIXED).rename(server.repository / FIXED)
    shutil.rmtree(aside)
    # The model reads its deployment as it is loaded.
    (server.repository / "deployment.yaml").write_bytes(msgspec.yaml.encode(wanted))
    server.load(FIXED, LOAD_S)
