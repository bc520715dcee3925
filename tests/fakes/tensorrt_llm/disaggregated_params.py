"""The parameters that go from a context request to its generation request."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from tensorrt_llm.bindings.executor import ContextPhaseParams, RequestType
from tensorrt_llm.version import OLDEST, SINCE_1_3, SINCE_1_4, UNRELEASED

_TYPES = {
    "context_only": RequestType.REQUEST_TYPE_CONTEXT_ONLY,
    "generation_only": RequestType.REQUEST_TYPE_GENERATION_ONLY,
    "context_and_generation": RequestType.REQUEST_TYPE_CONTEXT_AND_GENERATION,
}


class DisaggScheduleStyle(IntEnum):
    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    """Parameters of a request; in a context engine's answer, the link for the generation engine."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    if SINCE_1_3:
        first_gen_log_probs: list[Any] | None = None
        first_gen_logits: list[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    if SINCE_1_3:
        disagg_request_id: int | None = None
        ctx_dp_rank: int | None = None
        ctx_info_endpoint: str | None = None
        schedule_style: DisaggScheduleStyle | None = None
        ctx_usage: dict[str, Any] | None = None
    if SINCE_1_4:
        remote_tail_start: int | None = None
        multimodal_positions: list[int] | None = None
        multimodal_lengths: list[int] | None = None
        orig_elapsed_s: float | None = None
    if not OLDEST:
        multimodal_embedding_handles: list[dict[str, Any]] | None = None
        multimodal_hashes: list[list[int]] | None = None
        mrope_position_ids_handle: dict[str, Any] | None = None
        mrope_position_deltas_handle: dict[str, Any] | None = None
    if SINCE_1_4:
        multimodal_input_layout: Any = None
    if UNRELEASED:
        conversation_id: str | None = None
        # A field that the library sets itself, and that no caller may give.
        computed: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.request_type is not None:
            self.request_type = self.request_type.lower()
            self.get_request_type()
        if UNRELEASED:
            self.computed = {"since": self.request_type}

    def get_request_type(self) -> RequestType:
        """Return the request type. Raises ValueError: it is none of the three."""
        if self.request_type not in _TYPES:
            raise ValueError(
                f"request_type {self.request_type} is not known; allowed are {', '.join(_TYPES)}"
            )
        return _TYPES[self.request_type]

    def get_context_phase_params(self) -> ContextPhaseParams:
        """Return the link in the executor's form."""
        params = ContextPhaseParams(
            self.first_gen_tokens, self.ctx_request_id, self.opaque_state, self.draft_tokens
        )
        if SINCE_1_3:
            if self.disagg_request_id is not None:
                params.req_id = self.disagg_request_id
            params.ctx_dp_rank = self.ctx_dp_rank
            params.disagg_info_endpoint = self.ctx_info_endpoint
        return params
