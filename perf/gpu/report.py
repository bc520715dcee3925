"""The report of the suite: gpu.md, of all parts whose results are in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from perf.gpu.outcome import File, Rows, read


def write(folder: Path, parts: Sequence[str]) -> Path:
    """Write gpu.md anew, and return its path."""
    found = {part: file for part in parts if (file := read(part, folder)) is not None}
    path = folder / "gpu.md"
    path.write_text("\n".join(_lines(found)) + "\n")
    return path


def broken(part: str, folder: Path, reason: str) -> None:
    """Note in a part's results that its process did not end by itself."""
    path = folder / f"gpu-{part}.json"
    try:
        document = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return  # it has not even begun
    document["results"]["state"] = "failed"
    document["results"]["failures"].append(reason)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")


def _lines(found: dict[str, File]) -> Iterator[str]:
    yield "# GPU suite"
    for part, file in found.items():
        results = file.results
        yield f"\n## {part}: {results.state}, {results.seconds:.0f} s, size {results.scale}\n"
        about = {**file.machine, **file.versions}
        yield ", ".join(f"{name} {value}" for name, value in about.items()) + "."
        yield ""
        yield from (f"- **failed**: {line}" for line in results.failures)
        yield from (f"- not shown: {line}" for line in results.not_shown)
        if results.targets:
            yield "\n| what | measured | target | |\n|---|---|---|---|"
        for one in results.targets:
            met = one.met(one.limit)
            bound = "-" if one.limit is None else f"{one.bound} {one.limit:g}"
            verdict = {None: "", True: "met", False: "missed"}[met]
            yield f"| {one.what} | {one.measured:.4g} {one.unit} | {bound} | {verdict} |"
        for rows in results.tables:
            yield from _table(rows)


def _table(rows: Rows) -> Iterator[str]:
    yield f"\n{rows.title}\n"
    yield f"| {' | '.join(rows.columns)} |"
    yield "|" + "---|" * len(rows.columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows.rows)
