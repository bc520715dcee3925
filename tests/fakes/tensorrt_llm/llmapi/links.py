"""Links between a context request and its generation request, in each transceiver's form."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec
from msgspec import Struct
from tensorrt_llm._fake.exchange import Cache, Link
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi.disagg_utils import MIN_GLOBAL_ID
from tensorrt_llm.version import SINCE_1_3, UNRELEASED

# Not the number of the request, which is valid in its own engine only.
_FIRST_ID = 1000


class OpaqueState(Struct, frozen=True, array_like=True):
    """The C++ transceiver's link: the context engine's address, and the layout of its KV caches."""

    address: str
    cache: Cache


class Links:
    """The links of one engine.

    Args:
        runtime: whose links these are; None: it takes no part in disaggregated serving.
    """

    def __init__(
        self, runtime: Literal["CPP", "PYTHON"] | None, address: str, cache: Cache
    ) -> None:
        self._runtime = runtime
        self._address = address
        self._cache = cache
        self._ids = itertools.count(_FIRST_ID)

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return self._runtime is not None

    def id(self, params: DisaggregatedParams | None) -> int:
        """Return the id by which the engine knows a request.

        Raises:
            ValueError: the Python transceiver's two sides have no common one.
        """
        chosen = params.disagg_request_id if SINCE_1_3 and params is not None else None
        if chosen is not None:
            return chosen
        if params is not None and self._runtime == "PYTHON":
            raise ValueError("the Python transceiver needs a disagg_request_id")
        return next(self._ids) % MIN_GLOBAL_ID

    def made(self, id_: int, asked: DisaggregatedParams | None, tokens: int) -> DisaggregatedParams:
        """Return the link to a KV cache of so many tokens here, without its first token."""
        params = DisaggregatedParams(request_type="context_only", ctx_request_id=id_)
        if self._runtime == "CPP":
            params.opaque_state = msgspec.msgpack.encode(OpaqueState(self._address, self._cache))
        else:
            params.ctx_info_endpoint = self._address
            params.ctx_dp_rank = 0
        if SINCE_1_3 and asked is not None:
            params.disagg_request_id = asked.disagg_request_id
            params.schedule_style = asked.schedule_style
            params.ctx_usage = {"prompt_tokens": tokens, "cached_tokens": 0}
        if UNRELEASED and asked is not None:
            params.conversation_id = asked.conversation_id
        return params

    def found(self, params: DisaggregatedParams) -> Link:
        """Return the address of the KV cache of a generation request.

        Raises:
            ValueError: the link is not one of this transceiver's.
        """
        id_ = params.get_context_phase_params().req_id
        if id_ is None:
            raise ValueError("generation_only: neither disagg_request_id nor ctx_request_id")
        if self._runtime == "PYTHON":
            if not params.ctx_info_endpoint or params.ctx_dp_rank is None:
                raise ValueError(
                    "generation_only: the Python transceiver needs ctx_info_endpoint and "
                    "ctx_dp_rank; are both engines of one transceiver_runtime?"
                )
            return Link(id_, params.ctx_info_endpoint)
        if not params.opaque_state:
            raise ValueError(
                "generation_only: the C++ transceiver needs opaque_state; are both engines of one "
                "transceiver_runtime?"
            )
        try:
            state = msgspec.msgpack.decode(params.opaque_state, type=OpaqueState)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ValueError(f"generation_only: opaque_state cannot be read: {error}") from error
        return Link(id_, state.address, state.cache)
