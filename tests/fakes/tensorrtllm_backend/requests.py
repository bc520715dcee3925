"""Converts the tensors of a Triton request to requests inside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorrt_llm._fake.work import Kind, Work
from tensorrtllm_backend.params import deserialize

from pdserve.sampling import Sampling

Tensors = Mapping[str, NDArray[Any]]

KINDS: dict[str, Kind] = {
    "context_and_generation": "context_and_generation",
    "context_only": "context_only",
    "generation_only": "generation_only",
}
_REFUSED = (
    "bad_words_list",
    "min_tokens",
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "runtime_top_p_min",
    "runtime_top_p_decay",
)


@dataclass(frozen=True)
class SampleRequest:
    """One sample of a Triton request."""

    work: Work
    streaming: bool
    exclude_input: bool
    counts: tuple[bool, bool]
    """True if the client wants the numbers of input, and of output tokens."""


def samples(tensors: Tensors) -> list[Tensors]:
    """Return a sample for each row of a batch, without padding. Raises: ValueError."""
    for name in ("input_ids", "input_lengths", "request_output_len"):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
    found: list[Tensors] = []
    for row, length in enumerate(tensors["input_lengths"].reshape(-1)):
        sample = {name: tensor[row : row + 1] for name, tensor in tensors.items()}
        sample["input_ids"] = tensors["input_ids"][row, :length]
        found.append(sample)
    return found


def request_of(id_: int, kind: Kind, sample: Tensors, *, exclude_input: bool) -> SampleRequest:
    """Return the request of a sample. Raises ValueError: it cannot be served."""

    def single(name: str, default: Any = None) -> Any:
        tensor = sample.get(name)
        return default if tensor is None else tensor.reshape(-1)[0].item()

    refused = [name for name in _REFUSED if name in sample and np.any(sample[name])]
    refused += [n for n in ("beam_width", "num_return_sequences") if single(n, 1) > 1]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not in the fake")
    work = Work(
        id=id_,
        kind=kind,
        prompt=np.ascontiguousarray(sample["input_ids"], np.int32),
        sampling=_sampling(single),
        max_tokens=single("request_output_len"),
        end_id=single("end_id"),
        stop_words=_words(sample.get("stop_words_list")),
        interval=1 if single("streaming", False) else None,
    )
    if kind == "generation_only":
        if "context_phase_params" not in sample:
            raise ValueError("generation_only: context_phase_params is missing")
        params = deserialize(sample["context_phase_params"])
        work.link, work.first = params.link, params.first_gen_tokens[0]
    return SampleRequest(
        work,
        single("streaming", False),
        single("exclude_input_in_output", exclude_input),
        (single("return_num_input_tokens", False), single("return_num_output_tokens", False)),
    )


def _sampling(single: Any) -> Sampling:
    top_k, top_p = single("runtime_top_k", 0), max(single("runtime_top_p", 0.0), 0.0)
    temperature = single("temperature", 1.0)
    greedy = top_k == 1 or not (top_k or top_p)
    return Sampling(
        0.0 if greedy else temperature,
        0 if greedy else top_k,
        1.0 if greedy else top_p or 1.0,
        single("seed", 0),
        single("repetition_penalty", 1.0),
        single("presence_penalty", 0.0),
        single("frequency_penalty", 0.0),
    )


def _words(sparse: NDArray[Any] | None) -> list[list[int]]:
    """Return words from [1, 2, n]: the ids of all, and where each word ends; -1 is padding."""
    if sparse is None:
        return []
    ids, ends = sparse.reshape(2, -1).tolist()
    found, start = [], 0
    for end in ends:
        if end < 0:
            break
        if not start < end <= len(ids):
            raise ValueError(f"stop_words_list: the word's end {end} is not behind {start}")
        found.append(ids[start:end])
        start = end
    return found
