"""Tables of memory growth and of the cost of faults: soak.json, faults.json."""

from __future__ import annotations

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result


def soak() -> str:
    """Return the table of proportional set sizes and open files after the warm-up and at the
    end."""
    snapshots = Result("soak").results["snapshots"]
    first, last = snapshots[0], snapshots[-1]
    rows = []
    for name, old in first["processes"].items():
        new = last["processes"][name]
        mib = [number(one["pss_kib"] / 1024) for one in (old, new)]
        grown = f"{100 * (new['pss_kib'] / old['pss_kib'] - 1):.1f} %"
        files = f"{old['descriptors']}, {new['descriptors']}"
        rows.append((f"`{name}`", *mib, grown, files))
    after = [f"MiB after {one['requests']:,}" for one in (first, last)]
    return table(("process", *after, "growth", "open files, before and after"), rows)


def repairs() -> str:
    rows = [
        (
            row["deployment"],
            f"{row['hit']}, {row['how']} {row['faults']} times",
            f"{row['streams']:,}",
            str(row["lost"]),
            number(row["longest_gap_s"]),
            number(row["longest_ttft_s"]),
            row["noted"],
        )
        for row in Result("faults").results["repairs"]
    ]
    head = ("deployment", "fault", "streams", "lost", "longest gap, s", "longest TTFT, s", "noted")
    return table(head, rows)


def gateways() -> str:
    rows = [
        (
            f"{row['how']} {row['faults']} times",
            number(row["own_streams_end_within_s"]),
            number(row["serves_again_within_s"]),
            number(row["longest_gap_elsewhere_s"]),
            row["noted"],
        )
        for row in Result("faults").results["gateways"]
    ]
    head = (
        "a gateway's process or server",
        "its own streams end within, s",
        "it serves again within, s",
        "longest gap at the other gateway, s",
        "noted",
    )
    return table(head, rows)


def soak_with_faults() -> str:
    row = Result("faults").results["soak"]
    grown = ", ".join(f"`{name}` {mib} MiB" for name, mib in row["grown_mib"].items())
    rows = [
        ("streams", f"{row['streams']:,}"),
        ("streams lost", str(row["lost"])),
        ("longest time without a token in a stream", f"{row['longest_gap_s']} s"),
        ("growth of the gateway's processes", grown),
        ("noted", row["noted"]),
    ]
    return table(("what", "measured"), rows)
