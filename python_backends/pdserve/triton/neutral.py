"""Fields of TensorRT-LLM's ``ensemble`` that are accepted as long as they have no effect.

Its clients send many of them with every request. A neutral value has no effect; any other would
change the answer there, and is refused by name. The names are those of ``ensemble`` and
``tensorrt_llm_bls`` in TensorRT-LLM's ``triton_backend/all_models/inflight_batcher_llm``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from pdserve.errors import InvalidRequest, shown

NEUTRAL: dict[str, tuple[object, ...]] = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_tokens": (0,),
    "length_penalty": (1.0,),
    "num_draft_tokens": (0,),
    "lora_task_id": (0,),
    "prompt_vocab_size": (0,),
    "prompt_table_extra_id": (0,),
    "use_draft_logits": (False,),
    "return_log_probs": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "return_perf_metrics": (False,),
    "return_num_input_tokens": (False,),
    "return_num_output_tokens": (False,),
    "bad_words": (b"",),
    "embedding_bias_words": (b"",),
    "embedding_bias_weights": (0.0,),
    "decoder_text_input": (b"",),
    "image_url_input": (b"",),
    "guided_decoding_guide_type": (b"",),
    "guided_decoding_guide": (b"",),
}
"""The value that each element of a field must have. An empty field is neutral as well."""

FIELDS = frozenset(NEUTRAL) | {"end_id", "pad_id", "accumulate_tokens"}
"""All fields that are checked here, which a client has no reason to send."""


def check(
    tensors: Mapping[str, NDArray[Any]], end_ids: Collection[int], vocabulary_size: int
) -> None:
    """Check that the fields have no effect.

    Args:
        tensors: the request's inputs by name.
        end_ids: tokens that end an answer of the model.
        vocabulary_size: number of token ids.

    Raises:
        InvalidRequest: a value is not neutral; the message names it and what is allowed.
    """
    for name in tensors.keys() & NEUTRAL.keys():
        for value in _values(tensors, name):
            if value not in NEUTRAL[name]:
                (allowed,) = NEUTRAL[name]
                word = "none" if allowed == b"" else _json(allowed)
                raise InvalidRequest(f"{name}: {_json(value)}; allowed: {word}")
    for value in _values(tensors, "end_id"):
        if value not in end_ids:
            known = ", ".join(map(str, sorted(end_ids))) or "none"
            raise InvalidRequest(f"end_id: {value}; allowed: what ends this model's text: {known}")
    for value in _values(tensors, "pad_id"):  # nothing is ever padded
        if not 0 <= value < vocabulary_size:
            raise InvalidRequest(f"pad_id: {value}; allowed: 0 to {vocabulary_size - 1}")
    if any(_values(tensors, "accumulate_tokens")) and any(_values(tensors, "stream")):
        raise InvalidRequest("accumulate_tokens: true; allowed: false, or true without stream")


def _values(tensors: Mapping[str, NDArray[Any]], name: str) -> list[Any]:
    return tensors[name].reshape(-1).tolist() if name in tensors else []


def _json(value: object) -> str:
    """Format a value as a client may have written it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return shown(value.decode(errors="replace"))
    return f"{value:.8g}" if isinstance(value, float) else str(value)
