"""Part `engine`: steps of the torch engine against the rates of memory and arithmetic."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch.profiler import ProfilerActivity, profile

from pdserve.engines.protocol import DecodeSequence, PrefillJob
from pdserve.engines.pytorch.decode import TorchDecode
from pdserve.engines.pytorch.model import TorchModel
from pdserve.engines.pytorch.prefill import TorchPrefill
from pdserve.sampling import Sampling
from perf.budgets import Budget
from perf.gpu import model, roofline
from perf.gpu.model import SHAPES
from perf.gpu.outcome import Outcome, Rows
from perf.gpu.place import Place
from perf.gpu.roofline import Rates
from perf.gpu.scale import Scale

BLOCK = 16
STEP = 2.0
"""Target: a step of the largest batch, as a multiple of the time that memory needs."""
SHOWN = 12
"""Operations of a profile."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")


def run(outcome: Outcome, scale: Scale) -> None:
    """Measure decode steps and prompts of the served model."""
    place, shape = Place(scale), SHAPES[scale.served]
    rates = roofline.measured(scale, place)
    outcome.data("rates", rates)
    print(f"memory {rates.bytes_per_s / 1e9:.1f} GB/s, {rates.flop_per_s / 1e9:.0f} GFLOP/s")
    folder = model.made(scale.served, scale.dtype, scale.device)
    loaded = TorchModel(str(folder), scale.device, scale.dtype, 0)
    rows = [_prompt(scale, place, loaded, rates, tokens) for tokens in scale.steps.prompts]
    outcome.table(_table(rows))
    most = max(scale.steps.batches)
    room = -(-(scale.steps.context + 64) // BLOCK) * BLOCK
    decode = TorchDecode(loaded, most * room // BLOCK, BLOCK)
    itemsize = loaded.layout.itemsize
    for batch in scale.steps.batches:
        sequences = _sequences(batch, scale.steps.context, room)
        taken = place.ms(partial(decode.step, sequences), scale.steps.repeats)
        least = roofline.step_s(rates, shape, itemsize, batch, scale.steps.context) * 1e3
        rows.append(_row(f"decode step, batch {batch} of {scale.steps.context}", taken, least))
        outcome.table(_table(rows))
        if batch == most:
            limit = STEP if scale.gpu is not None else None
            what = f"{scale.served}: decode step at batch {batch}, of the time that memory needs"
            outcome.target(Budget(what, round(taken / least, 2), "x", "at most", limit))
            outcome.table(_profile(decode, sequences, scale, taken))


def _prompt(scale: Scale, place: Place, loaded: TorchModel, rates: Rates, tokens: int) -> list[str]:
    engine, layout = TorchPrefill(loaded), loaded.layout
    prompt = np.random.default_rng(tokens).integers(0, 256, tokens).astype(np.int32)
    job = PrefillJob(prompt, place.empty(*layout.shape(tokens)), Sampling())
    taken = place.ms(lambda: engine.prefill([job]), scale.steps.repeats)
    least = roofline.prompt_s(rates, SHAPES[scale.served], tokens) * 1e3
    return _row(f"prompt of {tokens} tokens", taken, least)


def _sequences(batch: int, context: int, room: int) -> list[DecodeSequence]:
    """Return sequences of `context` tokens; their K and V are zeros, which take as long.

    A step does not add its token, so that each step is of the same length.
    """
    prompt = np.full(context, 5, np.int32)
    return [DecodeSequence(prompt, [7], [(n * room, room)], Sampling()) for n in range(batch)]


def _profile(
    decode: TorchDecode, sequences: list[DecodeSequence], scale: Scale, taken: float
) -> Rows:
    """Return the operations of one step by the device's time, and how much of it is idle."""
    device = scale.gpu is not None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
    with profile(activities=activities) as profiled:
        decode.step(sequences)
    every = profiled.key_averages()
    # Those of the CPU have the device's time of the kernels that they launch, which also count by
    # themselves.
    events = [one for one in every if not device or one.device_type.name == "CUDA"]
    field = "self_device_time_total" if device else "self_cpu_time_total"
    events.sort(key=lambda event: -getattr(event, field))
    busy = sum(getattr(event, field) for event in events) / 1e3
    rows = [
        [event.key[:80], f"{event.count}", f"{getattr(event, field) / 1e3:.2f}"]
        for event in events[:SHOWN]
        if getattr(event, field)
    ]
    launches = sum(one.count for one in every if one.key.startswith(LAUNCHES))
    what = f"all: busy {busy:.2f} ms of {taken:.2f} ms"
    rows.append([f"{what}; {launches} kernels launched" if device else what, "", f"{busy:.2f}"])
    return Rows("Profile of the largest decode step", ["operation", "calls", "ms"], rows)


def _row(what: str, taken: float, least: float) -> list[str]:
    return [what, f"{taken:.2f}", f"{least:.2f}", f"{taken / least:.2f}"]


def _table(rows: list[list[str]]) -> Rows:
    columns = ["what", "ms", "least by memory or arithmetic, ms", "x"]
    return Rows("Steps of the torch engine", columns, rows)
