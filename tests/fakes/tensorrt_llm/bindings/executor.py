"""The values of the C++ executor that `tensorrt_llm.disaggregated_params` uses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tensorrt_llm.version import SINCE_1_3


class RequestType(IntEnum):
    REQUEST_TYPE_CONTEXT_AND_GENERATION = 0
    REQUEST_TYPE_CONTEXT_ONLY = 1
    REQUEST_TYPE_GENERATION_ONLY = 2


@dataclass(slots=True)
class ContextPhaseParams:
    """The data that a context engine leaves for a generation engine."""

    first_gen_tokens: list[int] | None
    req_id: int | None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    if SINCE_1_3:
        ctx_dp_rank: int | None = None
        disagg_info_endpoint: str | None = None
