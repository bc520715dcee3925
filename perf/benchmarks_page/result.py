"""A file of ``perf/results``: the results, with the command, the place and the time of the run."""

from __future__ import annotations

from typing import Any

import msgspec

from perf.benchmarks_page.markdown import number, table
from perf.budgets import Budget
from perf.record import RESULTS


class Result:
    """The contents of one file."""

    def __init__(self, name: str) -> None:
        """Read the file of this name, without ``.json``, in ``perf/results``.

        Raises:
            OSError: there is no such file.
        """
        self.name = name
        self._document = msgspec.json.decode((RESULTS / f"{name}.json").read_bytes())
        self.results: Any = self._document["results"]

    def conditions(self) -> str:
        """Return a paragraph: the command, the date, the commit and the machine, as far as
        recorded."""
        document = self._document
        when = document.get("when")
        parts = [f"`{document['command']}`", when[:10] if when else "date not recorded"]
        commit = document.get("versions", {}).get("pdserve")
        parts.append(f"commit {commit}" if commit else "commit not recorded")
        machine = document.get("machine")
        if machine:
            parts.append(f"{machine['cores']} cores of {machine['cpu']}")
        else:
            parts.append("machine not recorded")
        if "load_average_before" in document:
            parts.append(f"load average {document['load_average_before'][0]:.1f} at the start")
        file = f"[{self.name}.json](../perf/results/{self.name}.json)"
        source = f" {document['source']}" if "source" in document else ""
        return f"{file}: {', '.join(parts)}.{source}"

    def budgets(self) -> list[Budget]:
        """Return the measured values, in the order of the file."""
        return msgspec.convert(self.results["budgets"], list[Budget])

    def budget(self, what: str) -> Budget:
        """Return the measured value of this name.

        Raises:
            KeyError: the file has none.
        """
        for one in self.budgets():
            if one.what == what:
                return one
        raise KeyError(f"{self.name}.json has no {what!r}")


def against_target(rows: list[tuple[str, Budget]]) -> str:
    """Return a table of measured values and their targets, each row named in plain words."""
    cells = [(what, measured(one), target(one)) for what, one in rows]
    return table(("what", "measured", "target"), cells)


def measured(budget: Budget) -> str:
    """Format the measured value to three digits, with its unit."""
    whole = budget.measured >= 100 or budget.measured == int(budget.measured)
    digits = number(budget.measured) if whole else f"{budget.measured:#.3g}"
    return f"{digits} {budget.unit}".strip()


def target(budget: Budget) -> str:
    """Format the limit, and whether it is met."""
    if budget.limit is None:
        return "none"
    verdict = "met" if budget.met(budget.limit) else "missed"
    return f"{budget.bound} {number(budget.limit)} {budget.unit}".strip() + f": {verdict}"
