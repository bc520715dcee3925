"""Legacy: the C++ backend's tensors, those of a request and those of a response.

Source of names, types and shapes:
``triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.engines.external import Asked
from pdserve.errors import InstanceError

REQUEST_TYPE = "request_type"
"""A parameter of the request, not a tensor."""
CONTEXT, GENERATION = "context_only", "generation_only"
LINK = "context_phase_params"
IDS, LENGTH = "output_ids", "sequence_length"

Tensors = dict[str, NDArray[Any]]


def request(asked: Asked, eos_ids: list[int], *, streaming: bool, link: bytes = b"") -> Tensors:
    """Return the inputs of a request, each with a batch dimension of one."""
    sampling = asked.sampling
    tensors = {
        "input_ids": asked.prompt.astype(np.int32)[None],
        "input_lengths": _one(len(asked.prompt), np.int32),
        "request_output_len": _one(asked.max_tokens, np.int32),
        "streaming": _one(streaming, np.bool_),
        # Otherwise an answer that is not streamed begins with the prompt.
        "exclude_input_in_output": _one(True, np.bool_),
        "beam_width": _one(1, np.int32),
        "repetition_penalty": _one(sampling.repetition_penalty, np.float32),
        "presence_penalty": _one(sampling.presence_penalty, np.float32),
        "frequency_penalty": _one(sampling.frequency_penalty, np.float32),
    }
    if not asked.ignore_eos:
        tensors["end_id"] = tensors["pad_id"] = _one(eos_ids[0], np.int32)
        if len(eos_ids) > 1:
            others = eos_ids[1:]  # words of one token, and the end of each
            tensors["stop_words_list"] = np.array([[others, range(1, len(others) + 1)]], np.int32)
    if sampling.greedy:
        tensors["runtime_top_k"] = _one(1, np.int32)
    else:
        tensors["temperature"] = _one(sampling.temperature, np.float32)
        tensors["runtime_top_p"] = _one(sampling.top_p, np.float32)
        tensors["runtime_top_k"] = _one(sampling.top_k, np.int32)
        if sampling.seed is not None:
            tensors["seed"] = _one(sampling.seed, np.uint64)
    if link:
        tensors[LINK] = np.frombuffer(link, np.uint8)[None]
    return tensors


class Answer(NamedTuple):
    """The tokens and the link of a response."""

    ids: list[int]
    link: bytes


def answer(outputs: Tensors) -> Answer:
    """Read the outputs of a batch of one with one beam.

    Raises:
        InstanceError: the response has no tokens.
    """
    if IDS not in outputs or LENGTH not in outputs:
        raise InstanceError(f"a response without {IDS} or {LENGTH}: {sorted(outputs)}")
    ids = outputs[IDS].reshape(-1)
    length = int(outputs[LENGTH].reshape(-1)[0])
    link = outputs[LINK].tobytes() if LINK in outputs else b""
    return Answer(ids[:length].tolist(), link)


def _one(value: float, dtype: Any) -> NDArray[Any]:
    return np.array([[value]], dtype)
