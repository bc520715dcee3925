"""Compares the torch engine with transformers' own forward and generate, side by side in one run.

    python -m perf.engine [--model DIRECTORY] [--rounds 5] [--patience 120]

Ours and theirs take turns, and medians of the turns are compared. Turns during which other
processes took more than a tenth of the machine do not count, and are repeated as long as the
patience lasts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

# As in an instance: see pdserve.engines.build. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StoppingCriteria

from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.engines.pytorch.decode import TorchDecode
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.prefill import TorchPrefill
from pdserve.sampling import Sampling
from pdserve.transfer.arrays import scatter
from perf import budgets
from perf.budgets import Budget
from perf.record import Record
from perf.serving import MODEL

PROMPTS = (128, 512, 2000)
# Batches in one tuple take turns with each other, so that their ratio is of one period.
BATCHES = ((1, 8), (16,), (64,))
MAX_BATCH = 64
DECODE_PROMPT = 128
DECODE_TOKENS = 9
CALM = 0.1
# Short turns are repeated until each side has run for about these seconds.
LEAST_S = 10.0
console = Console()


class Row(Struct):
    """Ours and theirs, medians."""

    size: int
    """Number of prompt tokens, or of sequences in a step."""
    ours_ms: float
    theirs_ms: float
    ratio: float
    """Theirs divided by ours: the speed-up of ours."""

    @classmethod
    def of(cls, size: int, ours_s: float, theirs_s: float) -> Row:
        return cls(
            size, round(ours_s * 1e3, 1), round(theirs_s * 1e3, 1), round(theirs_s / ours_s, 3)
        )


class Clock(StoppingCriteria):
    """Records when generate has each token."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Others:
    """The share of the machine, 0 to 1, that other processes have used since the object was
    made."""

    def __init__(self) -> None:
        self._began = self._now()

    @property
    def share(self) -> float:
        total, foreign = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return foreign / total if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float]:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        total = sum(ticks) / os.sysconf("SC_CLK_TCK")
        return total, total - idle / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


@dataclass
class Turns:
    """Measures several sides in turns, and records how much other processes disturbed them."""

    rounds: int
    patience_s: float
    least_s: float
    """Approximate minimum seconds for each side of a measurement."""
    shares: list[float] = field(default_factory=list)

    def take(self, **sides: Callable[[], float]) -> dict[str, float]:
        """Return the median seconds of each side over its calmest turns; the first is a warm-up."""
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for side in sides.values():
            side()
        began = time.perf_counter()
        while True:
            for name, side in sides.items():
                others = Others()
                seconds = side()
                seen[name].append((others.share, seconds))
            calm = min(self._calm(turns) for turns in seen.values())
            taken_s = time.perf_counter() - began
            enough = calm >= self.rounds and taken_s > self.least_s * len(sides)
            if enough or taken_s > self.patience_s:
                break
        count = max(calm, self.rounds)
        counted = {name: sorted(turns)[:count] for name, turns in seen.items()}
        self.shares += [share for turns in counted.values() for share, _ in turns]
        return {name: statistics.median(s for _, s in turns) for name, turns in counted.items()}

    @staticmethod
    def _calm(turns: list[tuple[float, float]]) -> int:
        return sum(share < CALM for share, _ in turns)


def empty_range(model: TorchModel, tokens: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    layout = model.layout
    return np.zeros((layout.layers * 2, tokens, layout.row_bytes), np.uint8)


def prefill(model: TorchModel, theirs: Any, tokens: int, turns: Turns) -> Row:
    prompt = np.random.default_rng(tokens).integers(3, model.vocabulary, tokens).astype(np.int32)
    job = PrefillJob(prompt, empty_range(model, tokens), Sampling())
    engine = TorchPrefill(model)
    ids = torch.from_numpy(prompt).long()[None]

    @torch.inference_mode()
    def forward() -> None:
        theirs(ids, logits_to_keep=1)

    s = turns.take(ours=lambda: timed(lambda: engine.prefill([job])), theirs=lambda: timed(forward))
    return Row.of(tokens, s["ours"], s["theirs"])


def decode(model: TorchModel, theirs: Any, turns: Turns) -> list[Row]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.vocabulary, (MAX_BATCH, DECODE_PROMPT)).astype(np.int32)
    room = DECODE_PROMPT + DECODE_TOKENS
    engine = TorchDecode(model, MAX_BATCH * room, 1)
    source = empty_range(model, DECODE_PROMPT)
    TorchPrefill(model).prefill([PrefillJob(prompts[0], source, Sampling())])

    def ours(batch: int) -> float:
        sequences = [
            DecodeSequence(prompts[i], [5], [(i * room, room)], Sampling()) for i in range(batch)
        ]
        for sequence in sequences:
            scatter(source, engine.pool, sequence.rows(DECODE_PROMPT))
        ticks = []
        for _ in range(DECODE_TOKENS):
            for sequence, token in zip(sequences, engine.step(sequences), strict=True):
                sequence.tokens.append(token)
            ticks.append(time.perf_counter())
        return float(np.median(np.diff(ticks)))

    def generate(batch: int) -> float:
        clock = Clock()
        ids = torch.from_numpy(prompts[:batch]).long()
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=DECODE_TOKENS,
            do_sample=False,
            eos_token_id=None,
            stopping_criteria=[clock],
        )
        return float(np.median(np.diff(clock.ticks)))

    s: dict[str, float] = {}
    for batches in BATCHES:
        s |= turns.take(
            **{f"ours {batch}": partial(ours, batch) for batch in batches},
            **{f"theirs {batch}": partial(generate, batch) for batch in batches},
        )
    return [Row.of(n, s[f"ours {n}"], s[f"theirs {n}"]) for n in chain(*BATCHES)]


def run(model: str, rounds: int, patience_s: float, *, quick: bool) -> list[Budget]:
    """Measure, show, and write ``perf/results/engine.json``."""
    record = Record("engine-quick" if quick else "engine")
    transformers.logging.disable_progress_bar()
    turns = Turns(rounds, patience_s, 0.0 if quick else LEAST_S)
    ours = TorchModel(model, "cpu", "float32", 0)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prefills = [prefill(ours, theirs, tokens, turns) for tokens in PROMPTS]
    decodes = decode(ours, theirs, turns)
    table = Table("", "ours, ms", "theirs, ms", "as fast")
    for name, some in (("prefill", prefills), ("decode step, batch", decodes)):
        for row in some:
            times = f"{row.ours_ms:.1f}", f"{row.theirs_ms:.1f}"
            table.add_row(f"{name} {row.size}", *times, f"{row.ratio:.3f} x")
    by_batch = {row.size: row for row in decodes}
    gain = 8 * by_batch[1].ours_ms / by_batch[8].ours_ms
    worst = min(row.ratio for row in prefills)
    measured = [
        Budget("torch: prefill against forward, worst", worst, "x", "at least", 0.95),
        Budget("torch: decode 8 against generate 8", by_batch[8].ratio, "x", "at least", 1.0),
        Budget("torch: decode 8 against our decode 1", round(gain, 3), "x", "at least", 3.0),
    ]
    console.print(table)
    console.print(budgets.table(measured))
    conditions = {
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "taken_by_others_median": round(statistics.median(turns.shares), 3),
    }
    results = {
        "budgets": measured,
        "conditions": conditions,
        "prefill": prefills,
        "decode_step": decodes,
    }
    console.print(record.write(results))
    return measured


def main(
    model: Annotated[str, typer.Option(help="directory of a causal LM")] = str(MODEL),
    rounds: Annotated[int, typer.Option(help="turns that count")] = 5,
    patience: Annotated[float, typer.Option(help="seconds for a measurement at most")] = 120.0,
    quick: Annotated[bool, typer.Option("--quick", help="one turn each")] = False,
) -> None:
    """Compare the torch engine with transformers' own forward and generate, side by side in one
    run."""
    run(model, 1 if quick else rounds, patience, quick=quick)


if __name__ == "__main__":
    typer.run(main)
