"""The five figures of README.md, each with its meaning."""

from __future__ import annotations

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result

LOADS = (50, 80, 100, 120, 150)


def figures() -> str:
    """Return the table of README.md."""
    found = (_first_token(), _throughput(), _in_time(), _hidden(), _lost())
    rows = [(f"**{value}**", meaning) for value, meaning in found]
    return table(("figure", "what it means"), rows)


def _first_token() -> tuple[str, str]:
    added = Result("overhead").budget("TTFT added, 1 stream, median").measured
    meaning = (
        "is the median time to first token with engines that take no time: all that gRPC, "
        "tokenizer, scheduler and prefill add to a request"
    )
    return f"{number(added)} ms", meaning


def _throughput() -> tuple[str, str]:
    result = Result("overhead")
    serial = result.budget("8 streams against serial BLS").measured
    both = result.budget("8 streams against aggregated").measured
    meaning = (
        "is the throughput against a scheduler that serves one request at a time, with 8 streams "
        f"at 10 ms a token; it is {both:.2f} x that of one process that does both, so keeping "
        "prefill and decode apart costs no throughput there"
    )
    return f"{serial:.1f} x", meaning


def _in_time() -> tuple[str, str]:
    result = Result("scheduling-poisson")
    worst = min(result.budget(f"{load} %: within limit, of the ideal").measured for load in LOADS)
    good = {(point["policy"], point["level"]): point["good"] for point in result.results["points"]}
    robin = min(good["round_robin", load] / good["ideal", load] for load in LOADS)
    meaning = (
        "of the requests that an ideal scheduler answers in time are answered in time, at the "
        f"worst of five loads from {LOADS[0]} to {LOADS[-1]} % of what the prefills can compute; "
        f"with round robin it is {robin * 100:.0f} %"
    )
    return f"{worst * 100:.1f} %", meaning


def _hidden() -> tuple[str, str]:
    result = Result("exposure")
    hidden = min(
        result.budget(f"{tokens} tokens: of the transfer hidden").measured
        for tokens in (1000, 2000, 4000)
    )
    meaning = (
        "of the time that a KV cache takes over 1 Gbit/s is hidden behind the prefill, which "
        "hands it over layer by layer"
    )
    return f"{number(hidden)} %", meaning


def _lost() -> tuple[str, str]:
    runs = Result("faults").results["repairs"]
    lost, streams, faults = (sum(run[key] for run in runs) for key in ("lost", "streams", "faults"))
    meaning = (
        f"of {streams:,} streams were lost under {faults} faults that killed or stopped a prefill "
        "or a decode: they went on elsewhere, and every token was right"
    )
    return str(lost), meaning
