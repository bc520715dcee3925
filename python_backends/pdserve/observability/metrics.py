"""Metrics, and a registry in which a process counts before it publishes to Triton.

Each call into Triton's metric API is a round trip between processes, so nothing is sent at once:
``drain`` returns what has changed since the last time. A histogram is kept as the three series that
Prometheus stores of one (bucket, sum, count); the API would take one call per observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import accumulate
from typing import Any, Generic, Literal, NamedTuple, ParamSpec

P = ParamSpec("P")
Kind = Literal["counter", "gauge", "gone"]
Labels = tuple[tuple[str, str], ...]


class Metric(Generic[P]):
    """The declaration of a metric; there is one object of each, in ``catalogue``.

    Args:
        name: as Prometheus shows it.
        labels: makes a tuple of the labels' values; its parameters are their names. Callers must
            give exactly these: mypy checks it, and at run time the call raises TypeError.
        unit: unit of the values, or what is counted.
        help_text: a sentence that says what the values mean.
    """

    def __init__(
        self, name: str, labels: Callable[P, tuple[str, ...]], unit: str, help_text: str
    ) -> None:
        self.name = name
        self.labels = labels
        self.label_names = tuple(signature(labels).parameters)
        self.unit = unit
        self.help_text = help_text

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.name}"


class Counter(Metric[P]):
    """A number that only grows."""


class Gauge(Metric[P]):
    """A number that goes up and down."""


class Histogram(Metric[P]):
    """Values counted by size.

    Args:
        buckets: upper bounds, rising; values above the last are counted under ``+Inf``.
    """

    def __init__(
        self,
        name: str,
        labels: Callable[P, tuple[str, ...]],
        unit: str,
        help_text: str,
        buckets: tuple[float, ...],
    ) -> None:
        super().__init__(name, labels, unit, help_text)
        self.buckets = buckets
        self.bounds = (*map(str, buckets), "+Inf")


class Summary(Histogram[P]):
    """Values by their sum and their number alone, which take two series."""

    def __init__(
        self, name: str, labels: Callable[P, tuple[str, ...]], unit: str, help_text: str
    ) -> None:
        super().__init__(name, labels, unit, help_text, ())


class Change(NamedTuple):
    """A series' step (counter), its new value (gauge), or its end (gone)."""

    kind: Kind
    name: str
    help_text: str
    labels: Labels
    value: float

    @property
    def key(self) -> tuple[str, Labels]:
        """Return the key of the series."""
        return self.name, self.labels


class _Observed:
    """Values of a histogram since the last drain, counted by their bucket."""

    def __init__(self, bounds: int) -> None:
        self.values = [0] * bounds
        self.sum = 0.0


class Registry:
    """The counts of one process since it last published to Triton.

    ``add``, ``set`` and ``observe`` take a metric, a value and the metric's labels; ``drop`` ends
    gauges.

    Raises:
        TypeError: a label is missing or not declared.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Counter[Any], tuple[str, ...]], float] = {}
        self._observed: dict[tuple[Histogram[Any], tuple[str, ...]], _Observed] = {}
        self._levels: dict[tuple[Gauge[Any], tuple[str, ...]], float] = {}
        self._published: dict[tuple[Gauge[Any], tuple[str, ...]], float] = {}

    def add(self, counter: Counter[P], value: float, *labels: P.args, **named: P.kwargs) -> None:
        """Add ``value`` to a counter."""
        key = counter, counter.labels(*labels, **named)
        self._counts[key] = self._counts.get(key, 0) + value

    def set(self, gauge: Gauge[P], value: float, *labels: P.args, **named: P.kwargs) -> None:
        """Set a gauge to ``value``."""
        self._levels[gauge, gauge.labels(*labels, **named)] = value

    def drop(self, **labels: str) -> None:
        """End the gauges that have all of these values of labels: what they measure is gone."""
        wanted = labels.items()
        for gauge, values in list(self._levels):
            if wanted <= dict(_labels(gauge, values)).items():
                del self._levels[gauge, values]

    def observe(
        self, histogram: Histogram[P], value: float, *labels: P.args, **named: P.kwargs
    ) -> None:
        """Count one more value of a histogram."""
        key = histogram, histogram.labels(*labels, **named)
        observed = self._observed.get(key)
        if observed is None:
            observed = self._observed[key] = _Observed(len(histogram.bounds))
        observed.values[bisect_left(histogram.buckets, value)] += 1
        observed.sum += value

    def drain(self, *, counts: bool = True) -> Iterator[Change]:
        """Yield what has changed since the last call: gauges, and the rest where ``counts``."""
        if counts:
            yield from self._drain_counts()
        for key in [key for key in self._published if key not in self._levels]:
            gauge, values = key
            yield Change("gone", gauge.name, "", _labels(gauge, values), self._published.pop(key))
        for key, value in self._levels.items():
            if self._published.get(key) != value:
                self._published[key] = value
                gauge, values = key
                yield Change("gauge", gauge.name, gauge.help_text, _labels(gauge, values), value)

    def _drain_counts(self) -> Iterator[Change]:
        counts, self._counts = self._counts, {}
        histograms, self._observed = self._observed, {}
        for (counter, values), count in counts.items():
            yield Change(
                "counter", counter.name, counter.help_text, _labels(counter, values), count
            )
        for (histogram, values), observed in histograms.items():
            labels = _labels(histogram, values)
            for suffix, added, step in _steps(histogram, observed):
                name = f"{histogram.name}_{suffix}"
                yield Change("counter", name, histogram.help_text, (*labels, *added), step)


def _labels(metric: Metric[Any], values: tuple[str, ...]) -> Labels:
    return tuple(zip(metric.label_names, values, strict=True))


def _steps(histogram: Histogram[Any], observed: _Observed) -> Iterator[tuple[str, Labels, float]]:
    """Yield the series of a histogram: their suffixes, their additional labels, their steps."""
    below = list(accumulate(observed.values))
    yield "count", (), below[-1]
    yield "sum", (), observed.sum
    if not histogram.buckets:
        return
    # The page may be read between two steps: no bucket may ever be ahead of a higher one.
    for bound, values in zip(reversed(histogram.bounds), reversed(below), strict=True):
        if values:
            yield "bucket", (("le", bound),), values
