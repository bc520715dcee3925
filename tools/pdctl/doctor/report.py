"""Prints findings and conclusion on one screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdctl.doctor.advice.advice import Conclusion
from pdctl.doctor.advice.finding import Finding

_STYLES = {"ok": "green", "note": "yellow", "missing": "dim", "problem": "bold red"}


def report(findings: Iterable[Finding], conclusion: Conclusion, file: str) -> Group:
    """Return the report; `file` is the name of the deployment."""
    return Group(_listed(findings), "", _concluded(conclusion), "", _verdict(conclusion, file))


def _listed(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        for what, said in (
            ("used", finding.used),
            ("not used", finding.unused),
            ("mend", finding.mend),
        ):
            if said:
                text.append(f"\n{what}: ", style="dim")
                text.append(said, style="cyan" if what == "mend" else "dim")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), finding.about, text)
    return table


def _concluded(conclusion: Conclusion) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for what, could in (("engines", conclusion.engines), ("KV caches", conclusion.transports)):
        can = ", ".join(name for name, why in could.items() if not why)
        cannot = "; ".join(f"{name}: {why}" for name, why in could.items() if why)
        text = Text(can or "none")
        if cannot:
            text.append(f"\nnot possible: {cannot}", style="dim")
        table.add_row(what, text)
    return table


def _verdict(conclusion: Conclusion, file: str) -> Text:
    if conclusion.served:
        return Text(f"{file} can be served here: {conclusion.engine}.", style="green")
    return Text(f"{file} cannot be served here: see each problem above.", style="bold red")
