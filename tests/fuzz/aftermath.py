"""Checks after any input: no process has ended, nothing is held, other requests were served."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from tests.clients import generate, metrics, stub, wait_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Running

IDLE_S = 40.0
"""Time until KV caches that no decode takes are freed: several leases, on a busy machine."""
TOKENS = 40
MOST_SERIES = 150
"""Series that may appear with their first event: outcomes, buckets of histograms."""


@contextlib.contextmanager
def unharmed(server: Running) -> Iterator[None]:
    """Check that the block ends no process, leaves nothing held and delays no other request."""
    before, series = processes(server), len(metrics(server))
    with bystander(server):
        yield
    assert processes(server) == before, "a process has ended"
    wait_idle(server, IDLE_S)
    assert len(metrics(server)) < series + MOST_SERIES, "labels are made of the input"
    assert processes(server) == before, "a process has ended"


def processes(server: Running) -> dict[str, int]:
    """Return process ids by model."""
    models = [*server.deployment.instances("prefill"), *server.deployment.instances("decode")]
    return {model: stub(server, model).pid for model in ("pdserve", "scheduler", *models)}


@contextlib.contextmanager
def bystander(server: Running) -> Iterator[None]:
    """Send requests meanwhile, and check that each gets the same whole answer."""
    over, texts, failures = threading.Event(), set[str](), list[Exception]()

    def ask() -> None:
        while not (over.is_set() and texts) and not failures:
            try:
                answer = generate(
                    server, text_input="a bystander", max_tokens=TOKENS, ignore_eos=True
                )
                assert answer.stats["output_tokens"] == TOKENS
                texts.add(answer.text)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures
    assert len(texts) == 1, texts
