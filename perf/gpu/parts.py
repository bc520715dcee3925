"""The parts of the suite, the most telling first. The modules of each are imported when it runs."""
# ruff: noqa: PLC0415 - see above

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from perf.gpu.outcome import Outcome
from perf.gpu.scale import Scale


class Part(Struct, frozen=True):
    """One part."""

    about: str
    run: Callable[[Outcome, Scale, bool], None]
    """Runs it; the last argument tells whether it measures, or only checks."""
    checks: bool = True
    """True: `make test-gpu` runs it."""
    measures: bool = True
    """True: `make bench-gpu` runs it."""
    limit_s: float = 450.0


def _transfer(outcome: Outcome, scale: Scale, measure: bool) -> None:
    from perf.gpu import transfer

    transfer.run(outcome, scale, measure=measure)


def _exact(outcome: Outcome, scale: Scale, _: bool) -> None:
    from perf.gpu import exact, server

    with server.serving(scale, scale.small, each=1, baseline=False) as running:
        exact.run(outcome, scale, running)


def _serving(outcome: Outcome, scale: Scale, _: bool) -> None:
    from perf.gpu import server, serving

    with server.serving(scale, scale.served, each=1, baseline=True) as running:
        serving.run(outcome, scale, running)


def _faults(outcome: Outcome, scale: Scale, _: bool) -> None:
    from perf.gpu import faults, server

    with server.serving(scale, scale.small, each=2, baseline=False) as running:
        faults.run(outcome, scale, running)


def _engine(outcome: Outcome, scale: Scale, _: bool) -> None:
    from perf.gpu import engine

    engine.run(outcome, scale)


PARTS = {
    "transfer": Part("KV caches between two processes: every way, every byte", _transfer),
    "exact": Part("tokens of the real Triton against one model", _exact, measures=False),
    "engine": Part("engine steps against memory and arithmetic", _engine, checks=False),
    "serving": Part("TTFT, ITL and tokens/s, apart and together", _serving, checks=False),
    "faults": Part("processes killed, a context lost", _faults, measures=False),
}
