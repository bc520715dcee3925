"""The sampling of tokens, and the end of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.version import OLDEST, SINCE_1_3


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. None: the runtime's default."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    _bad_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    _stop_word_ids: list[list[int]] | None = field(default=None, init=False, repr=False)
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    if not OLDEST:
        prompt_ignore_length: int | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[Any] | None = None
    if not SINCE_1_3:
        lookahead_config: Any = None
    guided_decoding: Any = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    if SINCE_1_3:
        thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of or self.n
        if self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} is less than n {self.n}")
        if not OLDEST:
            for name, value, most in (
                ("temperature", self.temperature, None),
                ("top_k", self.top_k, None),
                ("top_p", self.top_p, 1),
            ):
                if value is not None and (value < 0 or (most is not None and value > most)):
                    raise ValueError(f"{name} {value} is out of range")

    @property
    def _greedy_decoding(self) -> bool:
        if self.top_k == 1 or self.top_p == 0.0 or self.temperature == 0:
            return True
        # From 1.1 on a temperature alone is enough to sample.
        given = (self.top_k, self.top_p, None if OLDEST else self.temperature)
        return all(value is None for value in given)

    def _setup(self, tokenizer: Any, ends: list[int]) -> None:
        """Fill in the values from the model's tokenizer and its end-of-text ids."""
        self.end_id = tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.end_id
        others = [id_ for id_ in ends if id_ != self.end_id]
        if others and not self.ignore_eos:
            self.stop_token_ids = sorted({*(self.stop_token_ids or []), *others})
        if self.stop is not None:
            strings = [self.stop] if isinstance(self.stop, str) else self.stop
            self._stop_word_ids = [
                tokenizer.encode(string, add_special_tokens=False) for string in strings
            ]

    def _get_stop_reasons_and_words(self) -> list[tuple[str | int, list[int]]]:
        """Return the stop reasons besides `end_id`, with their token ids."""
        found: list[tuple[str | int, list[int]]] = []
        found += [(id_, [id_]) for id_ in self.stop_token_ids or []]
        if self.stop is not None:
            if self._stop_word_ids is None:
                raise RuntimeError(f"stop {self.stop!r} was not tokenized")
            strings = [self.stop] if isinstance(self.stop, str) else self.stop
            found += zip(strings, self._stop_word_ids, strict=True)
        return found
