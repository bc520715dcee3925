"""The outcome of a part: checks, targets, tables, and what could not be shown; kept as it grows."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from perf.budgets import Budget
from perf.record import Record

PACKAGES = ("cuda-bindings", "nixl-cu12", "nixl-cu13", "nvidia-pytriton", "transformers")
FRESH_S = 6 * 3600.0
"""Age up to which a finished part is not run again, in seconds."""


class Rows(Struct):
    """A table of measurements."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Results(Struct):
    """The results of a part so far."""

    scale: str
    kind: str
    """test or bench."""
    state: str = "begun"
    """begun, done, or failed."""
    seconds: float = 0.0
    failures: list[str] = []
    """Checks that have failed: the part counts as failed with any."""
    targets: list[Budget] = []
    not_shown: list[str] = []
    tables: list[Rows] = []
    data: dict[str, Any] = {}


class File(Struct):
    """The results in a file of `Record`, as far as they are read again."""

    results: Results
    machine: dict[str, Any]
    versions: dict[str, str]


class Outcome:
    """One run of a part, written to `folder`/gpu-`part`.json whenever something is added."""

    def __init__(self, part: str, scale: str, kind: str, folder: Path) -> None:
        self.results = Results(scale, kind)
        self._record = Record(f"gpu-{part}", folder)
        self._began = time.monotonic()
        self.results.data["packages"] = _packages()
        self._save()

    def check(self, what: str, wrong: Sequence[object]) -> None:
        """Note a check: it has failed if anything is wrong, which the message then names."""
        print(f"{what}: {'right' if not wrong else 'WRONG'}", flush=True)
        if wrong:
            named = "; ".join(str(one) for one in wrong[:5])
            self.results.failures.append(f"{what}: {len(wrong)} wrong: {named}")
        self._save()

    def target(self, budget: Budget) -> None:
        """Note a measured value, and the target that it meets or misses."""
        met = budget.met(budget.limit)
        verdict = (
            ""
            if met is None
            else f", {budget.bound} {budget.limit:g}: " + ("met" if met else "missed")
        )
        print(f"{budget.what}: {budget.measured:.4g} {budget.unit}{verdict}", flush=True)
        self.results.targets.append(budget)
        self._save()

    def not_shown(self, what: str) -> None:
        """Note what could not be shown, and why."""
        print(f"not shown: {what}", flush=True)
        self.results.not_shown.append(what)
        self._save()

    def table(self, rows: Rows) -> None:
        """Add a table, or replace the one of the same title."""
        others = [one for one in self.results.tables if one.title != rows.title]
        self.results.tables = [*others, rows]
        self._save()

    def data(self, name: str, value: Any) -> None:
        """Keep measurements that no table has."""
        self.results.data[name] = value
        self._save()

    def end(self, failure: str = "") -> bool:
        """Note the end, and the error that was its cause; return whether all is right."""
        if failure:
            self.results.failures.append(failure)
        self.results.state = "failed" if self.results.failures else "done"
        self._save()
        return self.results.state == "done"

    def _save(self) -> None:
        self.results.seconds = round(time.monotonic() - self._began, 1)
        self._record.write(self.results)


def _packages() -> dict[str, str]:
    """Return the versions of installed packages that a record has not."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def keep(part: str, folder: Path, elsewhere: Path) -> None:
    """Copy the results of a finished part to another folder."""
    if folder != elsewhere:
        elsewhere.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / f"gpu-{part}.json", elsewhere)


def read(part: str, folder: Path) -> File | None:
    """Return the outcome of a part in a folder; None: there is none that can be read."""
    try:
        return msgspec.json.decode((folder / f"gpu-{part}.json").read_bytes(), type=File)
    except (OSError, msgspec.MsgspecError):
        return None


def finished(part: str, scale: str, kind: str, folder: Path) -> bool:
    """Tell whether a part has been done in this size, and lately; a bench is a test, too."""
    found = read(part, folder)
    if found is None or found.results.state != "done" or found.results.scale != scale:
        return False
    if found.results.kind not in (kind, "bench"):
        return False
    return time.time() - (folder / f"gpu-{part}.json").stat().st_mtime < FRESH_S
