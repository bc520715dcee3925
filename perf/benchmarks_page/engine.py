"""Tables of the PyTorch engine: engine.json, memory.json."""

from __future__ import annotations

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result


def prefill() -> str:
    return _rows("prefill", "prompt tokens", "transformers `forward`, ms")


def decode_step() -> str:
    return _rows("decode_step", "sequences in a step", "transformers `generate`, ms a step")


def _rows(key: str, size: str, theirs: str) -> str:
    rows = [
        (
            f"{row['size']:,}",
            number(row["ours_ms"]),
            number(row["theirs_ms"]),
            f"{row['ratio']:.2f} x",
        )
        for row in Result("engine").results[key]
    ]
    return table((size, "this engine, ms", theirs, "as fast"), rows)


def memory() -> str:
    rows = []
    for count, used in Result("memory").results.items():
        pss = {name: one["pss_kib"] / 1024 for name, one in used.items()}
        each = ", ".join(f"`{name}` {number(mib)}" for name, mib in sorted(pss.items()))
        rows.append((count, each, number(sum(pss.values()))))
    return table(("engine processes", "PSS of each, MiB", "together, MiB"), rows)
