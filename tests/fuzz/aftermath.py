"""What must be so after any input: nobody has ended, nothing is held, others were served."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from tests.clients import generate, metrics, stub, wait_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Running

IDLE_S = 40.0
"""Until what nobody has taken is given up: some leases, one after another, on a busy machine."""
TOKENS = 40
MOST_SERIES = 150
"""That come into being with the first of something: outcomes, buckets of histograms."""


@contextlib.contextmanager
def unharmed(server: Running) -> Iterator[None]:
    """Whatever is done meanwhile ends no process, leaves nothing held and stops nobody else."""
    before, series = processes(server), len(metrics(server))
    with bystander(server):
        yield
    assert processes(server) == before, "a process has ended"
    wait_idle(server, IDLE_S)
    assert len(metrics(server)) < series + MOST_SERIES, "labels are made of what is fed"
    assert processes(server) == before, "a process has ended"


def processes(server: Running) -> dict[str, int]:
    """Process ids by model."""
    models = [*server.deployment.instances("prefill"), *server.deployment.instances("decode")]
    return {model: stub(server, model).pid for model in ("pdserve", "scheduler", *models)}


@contextlib.contextmanager
def bystander(server: Running) -> Iterator[None]:
    """A client asks one thing after the other meanwhile, and always gets the same whole answer."""
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

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures
    assert len(texts) == 1, texts
