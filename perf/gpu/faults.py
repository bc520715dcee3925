"""Part `faults`: what is killed or lost costs no memory, and every request ends exactly once.

A prefill's process is killed during pulls, both between two bare processes and in a server; a
decode is killed, and one loses its CUDA context. The memory of the device that no process uses is
compared before and after.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from tests.clients import wait_idle, wait_until
from tests.faults.serving import repairs, stub
from tests.servers import Running

from pdserve.errors import PDServeError
from perf.budgets import Budget
from perf.gpu.outcome import Outcome
from perf.gpu.place import Place
from perf.gpu.scale import Scale
from perf.gpu.server import LOSE
from perf.gpu.streams import End, asked, prompts
from perf.gpu.transfer_bench import Bench

LAYOUT = "Llama-3-8B"
ENDED_S = 10.0
"""Time within which a pull from a killed process has ended."""
REPAIRED_S = 240.0
BACK_S = 60.0
SLACK_MIB = 1024
"""What allocators may keep in addition: a process of the suite has several times as much."""
PULLS_S = 1.0
"""Time for which KV caches are pulled before their holder is killed."""
BEGUN_S = 0.3
"""Time after which the first requests are being answered."""


def run(outcome: Outcome, scale: Scale, server: Running) -> None:
    """Kill what the server consists of, one after another."""
    pulls(outcome, scale)
    (one,) = server.servers
    decode, prefill = (
        server.deployment.servers[0].decode[0],
        server.deployment.servers[0].prefill[0],
    )
    faults: dict[str, tuple[str, Callable[[], object]]] = {
        "prefill killed": (prefill, lambda: stub(one, prefill).kill()),
        "decode killed": (decode, lambda: stub(one, decode).kill()),
        "context lost": (decode, (one.folder / LOSE).touch),
    }
    if scale.gpu is None:
        outcome.not_shown("a lost CUDA context, and device memory: a CPU raises the same errors")
    # The allocators keep what the same requests need again, which is no loss.
    asyncio.run(_struck(scale, server, lambda: None))
    for name, (model, strike) in faults.items():
        _fault(outcome, scale, server, name, model, strike)


def pulls(outcome: Outcome, scale: Scale) -> None:
    """Kill a holder while its KV caches are pulled, with no server around it."""
    place = Place(scale)
    before = place.free_bytes()
    if _killed(outcome, scale, place):
        _memory(outcome, place, "a prefill killed during pulls", before)


def _killed(outcome: Outcome, scale: Scale, place: Place) -> bool:
    """Kill a holder; return whether the receiver has given up its memory."""
    tokens = max(scale.transfers.tokens)
    name = "shm" if scale.gpu is None else "cuda_ipc"
    bench = Bench(place, name, LAYOUT, tokens)
    bench.connect(name)
    work = bench.ways(name, tokens, 0)["handed over"].work
    ended: list[str] = []

    def pull() -> None:
        try:
            while True:
                work()
        except (PDServeError, OSError, EOFError) as error:
            ended.append(f"{type(error).__name__}")
        except BaseException as error:
            ended.append(f"unexpected {error!r}")

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    time.sleep(PULLS_S)
    bench.holding.kill()
    killed = time.monotonic()
    thread.join(ENDED_S)
    taken = time.monotonic() - killed
    wrong = [one for one in ended if one.startswith("unexpected")]
    wrong += [] if ended else [f"the pull has not ended within {ENDED_S:g} s"]
    outcome.check("a prefill killed during pulls: the pull ends once, with an error", wrong)
    outcome.target(Budget("pull ended after the kill", round(taken, 3), "s", "at most", ENDED_S))
    if not ended:
        return False
    bench.close()
    return True


def _fault(
    outcome: Outcome,
    scale: Scale,
    server: Running,
    name: str,
    model: str,
    strike: Callable[[], object],
) -> None:
    place, (one,) = Place(scale), server.servers
    wait_idle(server, BACK_S)
    before, repaired = place.free_bytes(), repairs(one)
    ends, opened = asyncio.run(_struck(scale, server, strike))
    if not opened:
        outcome.not_shown(f"{name}: all requests had ended before")
    wrong = [
        f"{end.ends} ends, {len(end.tokens)} tokens {end.error}" for end in ends if end.ends != 1
    ]
    outcome.check(f"{name}: each of {len(ends)} requests ends once", wrong)
    began = time.monotonic()
    wait_until(lambda: repairs(one) > repaired and one.ready(), REPAIRED_S, lambda: f"{model}")
    whole = asyncio.run(asked(server, [1, 2, 3], 4))
    outcome.check(f"{name}: it serves again", [whole.error] if whole.error else [])
    failed = sum(bool(end.error) for end in ends)
    retried = sum(end.attempts > 1 for end in ends)
    outcome.data(
        name,
        {
            "requests": len(ends),
            "being answered when it struck": opened,
            "failed": failed,
            "more than one attempt": retried,
            "repaired after the last end, s": round(time.monotonic() - began, 1),
        },
    )
    wait_idle(server, BACK_S)
    _memory(outcome, place, name, before)


async def _struck(
    scale: Scale, server: Running, strike: Callable[[], object]
) -> tuple[list[End], int]:
    """Return how requests have ended, and how many were being answered when the fault struck.

    As many again are sent at that moment.
    """
    sizes = scale.serving
    asks = prompts(2 * sizes.streams, sizes.long_prompt, seed=int(time.monotonic()))
    tasks = [asyncio.ensure_future(asked(server, ask, sizes.fault_output)) for ask in asks[::2]]
    await asyncio.sleep(BEGUN_S)
    opened = sum(not task.done() for task in tasks)
    tasks += [asyncio.ensure_future(asked(server, ask, sizes.fault_output)) for ask in asks[1::2]]
    await asyncio.to_thread(strike)
    return list(await asyncio.gather(*tasks)), opened


def _memory(outcome: Outcome, place: Place, name: str, before: int) -> None:
    """Note whether a GPU has as much free memory as before; a CPU's is used by others, too."""
    if place.gpu is None:
        return
    deadline = time.monotonic() + BACK_S
    while (lost := (before - place.free_bytes()) / 2**20) > SLACK_MIB:
        if time.monotonic() > deadline:
            outcome.check(f"{name}: memory returns", [f"{lost:.0f} MiB are missing"])
            return
        time.sleep(0.1)
    outcome.check(f"{name}: memory returns", [])
    outcome.data(f"{name}: MiB missing", round(lost, 1))
