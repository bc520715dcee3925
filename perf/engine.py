"""The torch engine against transformers' own forward and generate, side by side in one run.

    python perf/engine.py [--model DIRECTORY] [--rounds 5] [--patience 120]

Ours and theirs take turns, and medians of the turns are compared. Turns during which
other processes took more than a tenth of the machine do not count, and are repeated
as long as patience lasts. Writes perf/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

# As an instance has it: see pdserve.engines.build. Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria

from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.engines.torch_decode import TorchDecode
from pdserve.engines.torch_model import TorchModel
from pdserve.engines.torch_prefill import TorchPrefill
from pdserve.messages import Sampling

HERE = Path(__file__).parent
DEFAULT_MODEL = HERE.parent / ".cache/models/SmolLM2-135M-Instruct"
PROMPTS = (128, 512, 2000)
# Those of a tuple take turns with each other, so that their ratio is of one time.
BATCHES = ((1, 8), (16,), (64,))
MAX_BATCH = 64
DECODE_PROMPT = 128
DECODE_TOKENS = 9
CALM = 0.1
# Short turns are taken more often, until each side has had about so long.
LEAST_S = 10.0


class Clock(StoppingCriteria):
    """Notes when generate has each token."""

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
    """The part of the machine, 0 to 1, that other processes have taken since it was made."""

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
    """Who takes turns, how often, and what disturbed them."""

    rounds: int
    patience_s: float
    shares: list[float] = field(default_factory=list)

    def take(self, **sides: Callable[[], float]) -> dict[str, float]:
        """Median of each side's seconds over its calmest turns; the first is a warm-up."""
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
            enough = calm >= self.rounds and taken_s > LEAST_S * len(sides)
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


def prefill(model: TorchModel, theirs: Any, tokens: int, turns: Turns) -> dict[str, Any]:
    prompt = np.random.default_rng(tokens).integers(3, model.vocab_size, tokens).astype(np.int32)
    job = PrefillJob(prompt, empty_range(model, tokens), Sampling())
    engine = TorchPrefill(model)
    ids = torch.from_numpy(prompt).long()[None]

    @torch.inference_mode()
    def forward() -> None:
        theirs(ids, logits_to_keep=1)

    s = turns.take(ours=lambda: timed(lambda: engine.prefill([job])), theirs=lambda: timed(forward))
    return {
        "prompt_tokens": tokens,
        "ours_ms": round(s["ours"] * 1e3, 1),
        "transformers_ms": round(s["theirs"] * 1e3, 1),
        "ratio": round(s["theirs"] / s["ours"], 3),
    }


def decode(model: TorchModel, theirs: Any, turns: Turns) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.vocab_size, (MAX_BATCH, DECODE_PROMPT)).astype(np.int32)
    room = DECODE_PROMPT + DECODE_TOKENS
    engine = TorchDecode(model, MAX_BATCH * room, 1)
    source = empty_range(model, DECODE_PROMPT)
    TorchPrefill(model).prefill([PrefillJob(prompts[0], source, Sampling())])

    def ours(batch: int) -> float:
        sequences = [
            DecodeSequence(prompts[i], [5], [(i * room, room)], Sampling()) for i in range(batch)
        ]
        for sequence in sequences:
            engine.join(sequence, source)
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
    return [
        {
            "batch": batch,
            "ours_ms_per_step": round(s[f"ours {batch}"] * 1e3, 1),
            "transformers_ms_per_step": round(s[f"theirs {batch}"] * 1e3, 1),
            "ours_tokens_per_s": round(batch / s[f"ours {batch}"], 1),
            "transformers_tokens_per_s": round(batch / s[f"theirs {batch}"], 1),
            "ratio": round(s[f"theirs {batch}"] / s[f"ours {batch}"], 3),
        }
        for batch in chain(*BATCHES)
    ]


def memory(model: str, processes: int) -> dict[str, Any]:
    """PSS of each process, all of them having read every weight.

    Of a copy of the model: a server that has it mapped would bear a part of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(model, f"{folder}/model")
        pss = pss_of(processes, f"{folder}/model")
    return {"processes": processes, "pss_mib": pss, "sum_mib": sum(pss)}


def pss_of(processes: int, model: str) -> list[int]:
    command = [sys.executable, __file__, "--model", model, "--hold"]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    pss = []
    for child in children:
        rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        pss.append(next(int(line.split()[1]) // 1024 for line in rollup if line.startswith("Pss:")))
    for child in children:
        child.communicate()
    return pss


def hold(model: str) -> None:
    """Be one of the processes: load, compute once, wait for the end of stdin."""
    held = TorchModel(model, "cpu", "float32", 0)
    print(held.fingerprint, flush=True)
    sys.stdin.read()


def machine() -> dict[str, Any]:
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu.split(":")[-1].strip(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--patience", type=float, default=120, help="seconds for a measurement")
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.hold:
        hold(options.model)
        return
    turns = Turns(options.rounds, options.patience)
    pss = [memory(options.model, n) for n in (1, 2)]
    for row in pss:
        print(f"PSS of {row['processes']} processes: {row['pss_mib']} MiB")
    model = TorchModel(options.model, "cpu", "float32", 0)
    theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(f"{'':16}{'ours':>10}{'theirs':>10}  ms")
    prefills = [prefill(model, theirs, tokens, turns) for tokens in PROMPTS]
    for row in prefills:
        name = f"prefill {row['prompt_tokens']}"
        print(f"{name:16}{row['ours_ms']:10}{row['transformers_ms']:10}  x {row['ratio']}")
    decodes = decode(model, theirs, turns)
    for row in decodes:
        name = f"decode {row['batch']}"
        ours, theirs_ms = row["ours_ms_per_step"], row["transformers_ms_per_step"]
        print(f"{name:16}{ours:10}{theirs_ms:10}  x {row['ratio']}")
    by_batch = {row["batch"]: row for row in decodes}
    gain = by_batch[8]["ours_tokens_per_s"] / by_batch[1]["ours_tokens_per_s"]
    measured = {
        "prefill against forward, worst": (min(row["ratio"] for row in prefills), 0.95),
        "decode 8 against generate 8": (by_batch[8]["ratio"], 1.0),
        "decode 8 against our decode 1": (round(gain, 3), 3.0),
    }
    budgets = [
        {"what": what, "measured": value, "at_least": limit, "met": value >= limit}
        for what, (value, limit) in measured.items()
    ]
    for row in budgets:
        print(f"{row['what']}: {row['measured']} (at least {row['at_least']})")
    results = {
        "command": "python perf/engine.py",
        "machine": machine()
        | {"taken_by_others_median": round(statistics.median(turns.shares), 3)},
        "memory": pss,
        "prefill": prefills,
        "decode": decodes,
        "budgets": budgets,
    }
    path = HERE / "results/engine.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
