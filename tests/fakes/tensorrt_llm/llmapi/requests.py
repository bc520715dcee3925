"""Converts the arguments of `LLM.generate_async` to a request inside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorrt_llm._fake.work import Kind, Work
from tensorrt_llm.version import OLDEST, SINCE_1_3

from pdserve.sampling import Sampling

if TYPE_CHECKING:
    from tensorrt_llm.disaggregated_params import DisaggregatedParams
    from tensorrt_llm.llmapi.links import Links
    from tensorrt_llm.sampling_params import SamplingParams

_REFUSED = (
    "bad",
    "bad_token_ids",
    "embedding_bias",
    "logits_processor",
    "apply_batched_logits_processor",
    "use_beam_search",
    "min_tokens",
    "no_repeat_ngram_size",
    "min_p",
    "top_p_decay",
    "logprobs",
    "prompt_logprobs",
    "return_context_logits",
    "return_generation_logits",
    "additional_model_outputs",
    "lookahead_config",
    "guided_decoding",
    "truncate_prompt_tokens",
)


@dataclass(frozen=True)
class Rules:
    """Rules of an engine for its requests."""

    max_seq_len: int
    overlapped: bool
    stream_interval: int


def prompt_of(
    inputs: Any, tokenizer: Any, sampling_params: SamplingParams
) -> tuple[str | None, list[int]]:
    """Return the text of a prompt, if it is one, and its token ids.

    Raises:
        TypeError, ValueError: it is no prompt.
    """
    if isinstance(inputs, Mapping):
        inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a prompt of text, and no tokenizer")
        special = sampling_params.add_special_tokens
        return inputs, tokenizer.encode(inputs, add_special_tokens=special)
    if not isinstance(inputs, list) or not all(isinstance(id_, int) for id_ in inputs):
        raise TypeError(f"inputs: text or token ids, not {type(inputs).__name__}")
    if not inputs:
        raise ValueError("an empty prompt")
    return None, list(inputs)


def sampling_of(params: SamplingParams) -> Sampling:
    """Return how the engine chooses tokens.

    Raises:
        NotImplementedError: the fake cannot.
    """
    asked = [name for name in _REFUSED if getattr(params, name, None)]
    if asked or params.best_of != 1:
        raise NotImplementedError(f"{', '.join(asked) or 'best_of'}: not in the fake")
    chosen = Sampling(
        repetition_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
    )
    if params._greedy_decoding:
        return chosen
    return Sampling(
        params.temperature or 1.0,
        params.top_k or 0,
        params.top_p or 1.0,
        params.seed,
        chosen.repetition_penalty,
        chosen.presence_penalty,
        chosen.frequency_penalty,
    )


def work_for(
    kind: str,
    ids: list[int],
    sampling_params: SamplingParams,
    params: DisaggregatedParams | None,
    rules: Rules,
    links: Links,
    *,
    streaming: bool,
) -> Work:
    """Return the request in the engine's form.

    Raises:
        ValueError: the engine would find that it cannot be served.
    """
    if OLDEST and kind == "context_only" and rules.overlapped:
        raise ValueError("context_only needs disable_overlap_scheduler")
    if SINCE_1_3 and params is not None and params.schedule_style:
        raise NotImplementedError("generation-first scheduling: not in the fake")
    room = rules.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(f"a prompt of {len(ids)} tokens; max_seq_len is {rules.max_seq_len}")
    work = Work(
        id=links.id(params if kind != "context_and_generation" else None),
        kind=_kind(kind),
        prompt=np.array(ids, np.int32),
        sampling=sampling_of(sampling_params),
        max_tokens=min(sampling_params.max_tokens or room, room),
        end_id=None if sampling_params.ignore_eos else sampling_params.end_id,
        stop_words=[word for _, word in sampling_params._get_stop_reasons_and_words()],
        interval=rules.stream_interval if streaming else None,
    )
    if kind == "generation_only":
        assert params is not None
        if not params.first_gen_tokens:
            raise ValueError("generation_only: no first_gen_tokens")
        work.first = params.first_gen_tokens[0]
        if links:
            work.link = links.found(params)
    return work


def _kind(kind: str) -> Kind:
    known: dict[str, Kind] = {
        "context_only": "context_only",
        "generation_only": "generation_only",
        "context_and_generation": "context_and_generation",
    }
    return known[kind]
