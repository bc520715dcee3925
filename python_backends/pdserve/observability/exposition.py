"""The metrics of a process without Triton, as text for Prometheus."""

from __future__ import annotations

from pdserve.observability.metrics import Labels, Registry


class Exposition:
    """Sums up what a registry counts, and shows it as a page."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._values: dict[str, dict[Labels, float]] = {}
        self._heads: dict[str, str] = {}

    def page(self) -> str:
        """Return every series, in Prometheus's text format (version 0.0.4)."""
        for change in self._registry.drain():
            series = self._values.setdefault(change.name, {})
            if change.kind == "gone":
                series.pop(change.labels, None)
                continue
            before = series.get(change.labels, 0.0) if change.kind == "counter" else 0.0
            series[change.labels] = before + change.value
            self._heads[change.name] = (
                f"# HELP {change.name} {change.help_text}\n# TYPE {change.name} {change.kind}\n"
            )
        return "".join(
            self._heads[name]
            + "".join(f"{name}{_shown(labels)} {value:.12g}\n" for labels, value in series.items())
            for name, series in sorted(self._values.items())
            if series
        )


def _shown(labels: Labels) -> str:
    """Return labels as in ``{group="chat"}``; their values are names."""
    inside = ",".join(f'{name}="{value}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""
