"""A request's sampling by the names of TensorRT-LLM's SamplingParams."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pdserve.engines.external import Asked
from pdserve.errors import DeploymentError

NEEDED = (
    "max_tokens", "end_id", "pad_id", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "detokenize", "temperature", "top_k", "top_p", "seed", "repetition_penalty",
    "presence_penalty", "frequency_penalty",
)  # fmt: skip
# Newer versions only. Without it the prompt counts for presence and frequency, too.
IGNORED_PROMPT = "prompt_ignore_length"


def check(fields: Collection[str]) -> None:
    """Raises: DeploymentError: the installed SamplingParams cannot say what a request may ask."""
    missing = [name for name in NEEDED if name not in fields]
    if missing:
        raise DeploymentError(f"tensorrt_llm: SamplingParams has no {', '.join(missing)}")


def arguments(asked: Asked, eos_ids: list[int], fields: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of a SamplingParams of its own: the engine writes to it.

    Args:
        eos_ids: that end an answer.
        fields: that the installed SamplingParams has.
    """
    sampling = asked.sampling
    given: dict[str, Any] = {
        "max_tokens": asked.max_tokens,
        # The engine has no tokenizer that would say it.
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
        # Without top_p it would be greedy, whatever the temperature; without top_k, all count.
        given |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:
            given["top_k"] = sampling.top_k
        if sampling.seed is not None:
            given["seed"] = sampling.seed
    if IGNORED_PROMPT in fields and (sampling.presence_penalty or sampling.frequency_penalty):
        given[IGNORED_PROMPT] = len(asked.prompt) - asked.resumed_tokens
    return given
