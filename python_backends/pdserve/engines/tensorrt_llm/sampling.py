"""A request's sampling parameters as TensorRT-LLM's SamplingParams."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pdserve.engines.external import Asked

NEEDED = (
    "max_tokens", "end_id", "pad_id", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "detokenize", "temperature", "top_k", "top_p", "seed", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
# Newer versions only. Without it the prompt counts for presence and frequency, too.
IGNORED_PROMPT = "prompt_ignore_length"


def arguments(asked: Asked, eos_ids: list[int], fields: Collection[str]) -> dict[str, Any]:
    """Return the keyword arguments of a new SamplingParams, which the engine modifies.

    Args:
        eos_ids: ids that end an answer.
        fields: fields of the installed SamplingParams.
    """
    sampling = asked.sampling
    given: dict[str, Any] = {
        "max_tokens": asked.max_tokens,
        # The engine has no tokenizer that would provide them.
        "end_id": eos_ids[0],
        "pad_id": eos_ids[0],
        "ignore_eos": asked.ignore_eos,
        "detokenize": False,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if len(eos_ids) > 1 and not asked.ignore_eos:
        given |= {"stop_token_ids": eos_ids[1:], "include_stop_str_in_output": True}
    if sampling.greedy:
        given["top_k"] = 1
    else:
        # Without top_p it would be greedy, whatever the temperature; without top_k, all tokens
        # count.
        given |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:
            given["top_k"] = sampling.top_k
        if sampling.seed is not None:
            given["seed"] = sampling.seed
    if IGNORED_PROMPT in fields and (sampling.presence_penalty or sampling.frequency_penalty):
        given[IGNORED_PROMPT] = len(asked.prompt) - asked.resumed_tokens
    return given
