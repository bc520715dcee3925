"""Control cost: the CPU time of one controller that leads 200 instances, as a share of a core.

``python -m perf.control_cost`` measures a real controller (store in a file, HTTP) against agents
and metrics pages that another process imitates: 25 servers of 8 instances, pages with every link,
a report of each agent every second, and a load that moves all counters.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from pdserve.config import Control, Deployment, Group, Scenario, Server
from pdserve.control import records, stores
from pdserve.control.controller import Controller
from pdserve.control.records import ObservedAgent, ObservedInstance, Phase
from pdserve.control.scrape import scrape
from pdserve.control.store.protocol import Delete, Put
from pdserve.control.stored import read
from pdserve.observability.metrics import Registry

GROUPS, SERVERS, EACH = 5, 25, 8
PORT = 19_000
REPORT_S = 1.0
LEAST = 10.0


def deployment() -> Deployment:
    """Return 200 instances in 5 groups on 25 servers, each with a gateway."""
    servers = []
    for number in range(SERVERS):
        own = [f"i_{number}_{place}" for place in range(EACH)]
        port = PORT + 3 * number
        servers.append(
            Server(
                f"s_{number}",
                http_port=port,
                grpc_port=port + 1,
                metrics_port=port + 2,
                prefill=tuple(own[: EACH // 2]),
                decode=tuple(own[EACH // 2 :]),
            )
        )
    groups = []
    for number in range(GROUPS):
        own_servers = servers[number::GROUPS]
        prefill = tuple(name for server in own_servers for name in server.prefill)
        decode = tuple(name for server in own_servers for name in server.decode)
        groups.append(Group(f"g_{number}", prefill, decode))
    control = Control("cost", ratio="act")
    scenario = Scenario("default", tuple(groups))
    return Deployment("m", tuple(servers), scenarios=(scenario,), control=control)


class World:
    """Imitates agents and servers."""

    def __init__(self, run: Path) -> None:
        self.deployment = deployment()
        self.run = run
        self.began = time.time()
        groups = self.deployment.scenarios[0].groups
        self.peers = {name: group.prefill for group in groups for name in group.decode}

    def page(self, server: Server) -> str:
        """Return a page of the size of a real one."""
        done = 10 * (time.time() - self.began)
        lines = [f'nv_inference_count{{model="{name}",version="1"}} {done}' for name in range(200)]
        for name in server.prefill:
            own = f'{{instance="{name}"}}'
            lines += [
                f"pdserve_prefill_seconds_count{own} {done}",
                f"pdserve_busy_seconds_total{own} {done / 12}",
                f"pdserve_slot_seconds_total{own} {done / 5}",
                f'pdserve_kv_leases{{instance="{name}",state="leased"}} 1',
            ]
        for name in server.decode:
            own = f'{{instance="{name}"}}'
            lines += [
                f"pdserve_decode_seconds_count{own} {done}",
                f"pdserve_busy_seconds_total{own} {done / 12}",
                f"pdserve_slot_seconds_total{own} {done * 5.3}",
            ]
            for peer in self.peers[name]:
                link = f'{{prefill="{peer}",decode="{name}",transport="shm",detail="shm"}}'
                lines += [
                    f"pdserve_kv_link_bytes_per_second{link} 1e10",
                    f"pdserve_kv_link_latency_seconds{link} 1e-6",
                ]
        for group in self.deployment.scenarios[0].groups:
            own = f'{{gateway="pdserve",group="{group.name}",role="prefill"}}'
            routed = f'{{scenario="default",group="{group.name}"}}'
            lines += [
                f"pdserve_waiting_requests{own} 0",
                f"pdserve_oldest_waiting_seconds{own} 0",
                f"pdserve_routed_requests_total{routed} {done}",
            ]
        return "\n".join(lines) + "\n"

    async def serve(self) -> None:
        for server in self.deployment.servers:

            async def answer(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                server: Server = server,
            ) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.page(server).encode())
                await writer.drain()
                writer.close()

            await asyncio.start_server(answer, "127.0.0.1", server.metrics_port)

    async def report(self) -> None:
        """Report every instance as desired, with other numbers each time."""
        assert self.deployment.control is not None
        store = await stores.opened(self.deployment.control, self.run)
        lease = (await store.grant(10.0)).id
        turn = 0
        while True:
            turn += 1
            desired = read(await store.list_prefix("")).desired
            for server in self.deployment.servers:
                agent = ObservedAgent(1, (server.name,))
                key = records.OBSERVED_AGENTS + server.name
                puts: list[Put | Delete] = [Put(key, records.encode(agent), lease)]
                for name in (*server.prefill, *server.decode):
                    if name in desired:
                        seen = ObservedInstance(
                            server.name, server.name, "h:1", "flexible", "ready"
                        )
                        seen = replace(
                            seen,
                            epoch="e",
                            assignment=desired[name].assignment,
                            phase=Phase.SERVING,
                            used=turn % 7,
                        )
                        puts.append(
                            Put(records.OBSERVED_INSTANCES + name, records.encode(seen), lease)
                        )
                await store.transact((), puts)
            await asyncio.sleep(REPORT_S)


def imitate(run: Path) -> None:
    """Be the agents and servers until killed."""

    async def work() -> None:
        world = World(run)
        await world.serve()
        await world.report()

    asyncio.run(work())


async def measure(run: Path, seconds: float) -> float:
    """Return the share of a core that a controller takes."""
    made = deployment()
    assert made.control is not None
    store = await stores.opened(made.control, run)

    async def probe(*_: object) -> bool:
        return True

    metrics = Registry()
    controller = Controller(store, "cost", lambda: made, scrape, probe, metrics)
    working = asyncio.ensure_future(controller.run())
    await asyncio.sleep(LEAST)
    began, used = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    share = (time.process_time() - used) / (time.perf_counter() - began)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    for change in metrics.drain():
        if "turn" in change.name or "scrape" in change.name or "events" in change.name:
            print(change.name, dict(change.labels), round(change.value, 2))
    await store.close()
    return share


def main(
    seconds: Annotated[float, typer.Option(help="Seconds to measure.", min=5)] = 60,
    most: Annotated[float, typer.Option(help="Exit status 1 above this share of a core.")] = 0.05,
) -> None:
    """Measure one controller at 200 instances."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        child = multiprocessing.get_context("spawn").Process(target=imitate, args=(run,))
        child.start()
        try:
            share = asyncio.run(measure(run, seconds))
        finally:
            child.kill()
            child.join()
    print(f"{SERVERS * EACH} instances on {SERVERS} servers: {share:.1%} of a core")
    raise typer.Exit(share > most)


if __name__ == "__main__":
    typer.run(main)
