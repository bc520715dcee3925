"""Tests that docs/tuning.md agrees with the results, and names only what exists."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from perf.scheduling.workload import PROMPT_TOKEN_S
from perf.transfer.layouts import LAYOUTS

from pdctl.paths import ROOT
from pdserve import config

TEXT = (ROOT / "docs" / "tuning.md").read_text()
PROSE = " ".join(TEXT.split())
PROMPT, ANSWER, XI_MIB = 512, 64, 64
SMALL, LARGE = LAYOUTS["SmolLM2-135M"], LAYOUTS["Llama-3-8B"]
PREFILL, DECODE, TRANSFER = config.Prefill(), config.Decode(), config.Transfer()


def results(name: str) -> Any:
    return json.loads((ROOT / "perf" / "results" / f"{name}.json").read_bytes())


def moved(layout: str, link: str) -> tuple[int, float]:
    """Return tokens, and milliseconds of the chosen strategy, for 64 MiB in blocks of 16."""
    for point in results("transfer")["results"]["points"]:
        asked = point["layout"], point["link"], point["block"], round(point["mib"])
        if asked == (layout, link, 16, XI_MIB):
            return point["tokens"], point["ways"][point["chosen"]]
    raise AssertionError(f"{layout} over {link}: no such point")


class Example:
    """Equation (1) with the measured times of the torch engine."""

    def __init__(self) -> None:
        engine = results("engine")["results"]
        forward = {row["size"]: row["ours_ms"] / 1e3 for row in engine["prefill"]}
        self.rates = {tokens: round(tokens / forward[tokens]) for tokens in forward}
        self.step = {row["size"]: row["ours_ms"] / 1e3 for row in engine["decode_step"]}
        self.t_p = forward[PROMPT]
        self.xi = moved("SmolLM2-135M", "shm")[1] / 1e3
        self.prefill = 1 / self.t_p

    def t_d(self, answer: int, batch: int) -> float:
        return self.xi + (answer - 1) * self.step[batch]

    def ratio(self, answer: int, batch: int) -> float:
        return batch / self.t_d(answer, batch) / self.prefill


@pytest.fixture(scope="module")
def example() -> Example:
    return Example()


def test_the_ratio(example: Example) -> None:
    t_d, step = example.t_d(ANSWER, 16), example.step[16]
    decode = 16 / t_d
    for row in (
        f"| T_p, b_p | {example.t_p:.3f} s, 1 |",
        f"| a prefill: b_p / T_p | {example.prefill:.3f} requests/s | 1 / {example.t_p:.3f} |",
        f"| TPOT(16), xi | {step:.3f} s, {example.xi:.3f} s |",
        f"| T_d, b_d | {t_d:.2f} s, 16 | {example.xi:.3f} + {ANSWER - 1} x {step:.3f} |",
        f"| a decode: b_d / T_d | {decode:.3f} requests/s | 16 / {t_d:.2f} |",
        f"| n_p / n_d | {example.ratio(ANSWER, 16):.2f} | {decode:.3f} / {example.prefill:.3f} |",
    ):
        assert row in TEXT


@pytest.mark.parametrize(("p", "d"), [(1, 2), (1, 1), (5, 4), (4, 3), (2, 1)])
def test_rounded(example: Example, p: int, d: int) -> None:
    prefills, decodes = p * example.prefill, d * 16 / example.t_d(ANSWER, 16)
    each = min(prefills, decodes) / (p + d)
    assert f"| {p} : {d} | {prefills:.2f} | {decodes:.2f} | {each:.3f} |" in TEXT


@pytest.mark.parametrize(("answer", "batch"), [(64, 8), (64, 16), (64, 64), (256, 16)])
def test_other_lengths(example: Example, answer: int, batch: int) -> None:
    t_d, ratio = example.t_d(answer, batch), example.ratio(answer, batch)
    assert f"| {answer} tokens | {batch} | {t_d:.2f} s | {ratio:.2f} |" in TEXT


def test_what_servers_have_shown() -> None:
    shown = results("scheduling")["results"]
    # It was measured again since.
    points = [*shown["points"], *results("scheduling-poisson")["results"]["points"]]
    ours = {(p["part"], p["level"]): p for p in points if p["policy"] == "on_demand"}
    at_most, gateways = (ours[key]["good_per_s"] for key in (("poisson", 150), ("4 gateways", 150)))
    assert f"answered {at_most:.2f} a second within their limits" in PROSE
    assert f"with four gateways {gateways:.2f}" in PROSE
    assert f"n_p b_p / T_p = {2 / (1000 * PROMPT_TOKEN_S):.0f} requests/s" in PROSE
    assert f"100 ms of prefill and {shown['added_ms']:.0f} ms of the rest" in PROSE
    good = [f"{ours['poisson', level]['good'] * 100:.1f}" for level in (50, 80, 100, 120, 150)]
    assert f"50, 80, 100, 120, 150 % of what the prefills can compute: {', '.join(good)} %" in PROSE


def test_batches(example: Example) -> None:
    rates, step = example.rates, example.step
    assert f"{rates[128]} at 128 tokens, {rates[512]} at 512 and {rates[2000]} at 2,000" in PROSE
    assert PREFILL.batch_tokens == PROMPT
    steps = ", ".join(f"{step[batch] * 1e3:.0f}" for batch in (1, 8, 16, 64))
    tokens = ", ".join(f"{batch / step[batch]:.0f}" for batch in (1, 8, 16, 64))
    assert f"sequences takes {steps} ms, which is {tokens} tokens/s" in PROSE
    assert step[16] * 1e3 < 220, "as `tpot_limit_ms: 220` says"
    blocks = math.ceil((PROMPT + ANSWER) / DECODE.block_size)
    assert f"are {blocks} blocks: the default {DECODE.blocks:,} hold {DECODE.blocks // blocks}" in (
        PROSE
    )
    assert f"{DECODE.slots} slots want {DECODE.slots * blocks:,}" in PROSE


def test_memory() -> None:
    small, large = SMALL.bytes_per_token, LARGE.bytes_per_token
    pool, arena = DECODE.blocks * DECODE.block_size, PREFILL.arena_mib
    assert f"2 x 30 x 3 x 64 x 4 = {small / 1024:.0f} KiB | 2 x 32 x 8 x 128 x 2" in TEXT
    assert f"= {large / 1024:.0f} KiB |" in TEXT
    slots = PREFILL.slots
    first, second = slots * 512 * small >> 20, slots * 2048 * large >> 20
    assert f"| {slots} x 512 tokens: {first} MiB | {slots} x 2,048 tokens: {second:,} MiB |" in TEXT
    rooms = (arena << 20) // small - slots * 512, (4096 << 20) // large - slots * 2048
    assert f"| {arena} MiB: {rooms[0]:,} tokens | 4,096 MiB: {rooms[1]:,} tokens |" in TEXT
    pools = pool * small >> 20, pool * large >> 20
    assert f"1,024 x 16: {pools[0]} MiB | 1,024 x 16: {pools[1]:,} MiB |" in TEXT


@pytest.mark.parametrize("layout", ["SmolLM2-135M", "Llama-3-8B"])
def test_transfers(layout: str) -> None:
    found = [moved(layout, link) for link in ("shm", "cma", "tcp", "hosts")]
    times = " | ".join(f"{ms:.1f} ms" for _, ms in found)
    assert f"| {layout}, {found[0][0]:,} tokens | {times} |" in TEXT


def test_hidden_transfers() -> None:
    rows = results("exposure")["results"]["rows"]
    whole, layered = (
        next(row for row in rows if (row["tokens"], row["strategy"]) == (1000, strategy))
        for strategy in ("whole", "auto")
    )
    assert f"of {whole['transfer']:.0f} ms for 1,000 tokens at 1 Gbit/s, " in PROSE
    assert f"{layered['exposed']:.0f} ms are left after the prefill" in PROSE
    assert f"1,000 tokens take {whole['transfer'] / 1e3:.2f} s" in PROSE
    assert f"in the prefill {whole['prefill'] / 1e3:.2f} s" in PROSE
    arrivals = results("arrivals")["results"]["budgets"][0]["measured"]
    assert f"p99 {arrivals:.2f} times as long" in PROSE
    assert TRANSFER.staging_mib == 4 * TRANSFER.pulls


def test_every_field_is_one_of_a_deployment() -> None:
    deployment = config.Deployment.__annotations__
    found = set(re.findall(r"\b(prefill|decode|transfer|gateway|engine)\.(?!json)(\w+)", TEXT))
    assert len(found) > 15
    for section, name in found:
        struct = getattr(config, deployment[section])
        assert name in struct.__struct_fields__, f"{section}.{name}"
    for name in set(re.findall(r"`(\w+_limit_ms)", TEXT)):
        assert name in config.Scenario.__struct_fields__
