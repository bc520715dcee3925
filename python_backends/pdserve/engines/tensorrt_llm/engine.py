"""An engine over one ``LLM``, by its ``context_only`` and ``generation_only`` requests."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from pdserve import config, errors
from pdserve.config.llm_options import LlmArguments, LlmOptions
from pdserve.engines import checkpoint
from pdserve.engines.external import Asked, Context, FinishReason, Piece, Report
from pdserve.engines.tensorrt_llm import options, sampling
from pdserve.engines.tensorrt_llm.api import Api
from pdserve.engines.tensorrt_llm.drain import first_piece
from pdserve.engines.tensorrt_llm.link import pack, unpack

_log = logging.getLogger(__name__)

CONTEXT, GENERATION = "context_only", "generation_only"
# Smaller ids are the engine's own (disagg_utils.py: MIN_GLOBAL_ID); it has 64 signed bits for them.
FIRST_ID, LAST_ID = 1 << 40, (1 << 63) - 1
# Timeout for statistics and events that have arrived already; waiting is done elsewhere.
LOOK_S = 0.01
FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def new(
    name: str, role: config.Role, deployment: config.Deployment, context_length: int
) -> TensorRTLLM:
    """Make the engine of an instance; see ``TensorRTLLM``."""
    return TensorRTLLM(name, role, deployment, context_length)


class TensorRTLLM:
    """One ``LLM`` in one role: a ``ContextEngine`` or a ``GenerationEngine``.

    Its calls are made in the instance's event loop; it computes in processes of its own.

    Args:
        context_length: context length of the model.

    Raises:
        DeploymentError: it is not installed, lacks a name that is used, or refuses its arguments.
    """

    def __init__(
        self, name: str, role: config.Role, deployment: config.Deployment, context_length: int
    ) -> None:
        engine, limits = deployment.engine, getattr(deployment, role)
        wanted = engine.tensorrt_llm
        arguments = getattr(wanted, role)
        self.context_length = min(context_length, arguments.max_seq_len or context_length)
        model = Path(deployment.model)
        self._eos_ids = checkpoint.eos_ids(model)
        self.vocabulary = checkpoint.vocabulary(model)
        self._api = api = Api(engine.gpus.get(name, ()))
        slots = limits.slots
        if name in deployment.flexible:  # it stays as it is when the role changes
            slots = max(deployment.prefill.slots, deployment.decode.slots)
        lease_s = deployment.prefill.kept_s
        transceiver = options.transceiver(api, wanted.cache_transceiver_config, lease_s)
        pool = options.pool(api, role, arguments.kv_cache_config)
        others = options.arguments(api, role, arguments)
        for warning in options.warnings(api, deployment, role, os.environ):
            _log.warning("%s: %s", name, warning)
        self.keeps_s = lease_s if api.has_timeout else math.inf
        self._drain_s = lease_s
        self.fingerprint = _fingerprint(api.version, model, transceiver, wanted, arguments)
        try:
            self._llm: Any = api.llm(
                model=str(model),
                backend="pytorch",
                skip_tokenizer_init=True,
                tensor_parallel_size=limits.tensor_parallel,
                max_batch_size=slots,
                kv_cache_config=api.kv_cache_config(**pool),
                cache_transceiver_config=api.cache_transceiver_config(**transceiver),
                **others,
            )
        except (TypeError, ValueError) as error:
            raise errors.DeploymentError(f"engine tensorrt_llm, {name}: {error}") from error
        self._shows_pool = bool(arguments.enable_iter_perf_stats)
        self._tells_events = bool(arguments.kv_cache_config.event_buffer_max_size)

    # ------------------------------------------------------------------ context

    async def context(self, asked: Asked, keep: bool) -> Context:
        """Implements ``ContextEngine``."""
        params = None
        if keep:
            params = self._api.disaggregated_params(request_type=CONTEXT, **self._new_id())
        output = self._begin(asked, params, streaming=False)
        try:
            await first_piece(output.aresult(), self._drain_s if keep else 0.0)
        except Exception as error:
            raise errors.InstanceError(f"context_only: {error!r}") from error
        finally:
            _abort(output)
        [completion] = output.outputs
        if completion.finish_reason not in FINISHED or len(completion.token_ids) != 1:
            raise errors.InstanceError(
                f"context_only: {len(completion.token_ids)} tokens, {completion.finish_reason}"
            )
        [token] = completion.token_ids
        made = completion.disaggregated_params
        if keep and made is not None and made.ctx_request_id is not None:
            # Versions differ in whether a finished one is kept, too: it counts as kept.
            return Context(token, token in self._eos_ids, pack(made), 0)
        if keep and completion.finish_reason != "stop":
            raise errors.InstanceError("context_only: no link came back")
        return Context(token, token in self._eos_ids, b"", 0)

    def _new_id(self) -> dict[str, int]:
        """Return a new id for an attempt: with the same id, a retry would find the former one."""
        if not self._api.has_own_ids:
            return {}
        return {"disagg_request_id": FIRST_ID + secrets.randbelow(LAST_ID - FIRST_ID)}

    # --------------------------------------------------------------- generation

    async def generate(
        self, asked: Asked, first: int | None, link: bytes
    ) -> AsyncGenerator[Piece, None]:
        """Implements ``GenerationEngine``."""
        params = None
        if first is not None:
            params = unpack(link, self._api.disaggregated_params, GENERATION)
        output = self._begin(asked, params, streaming=True)
        told = [] if first is None else [first]
        parts = aiter(output)
        try:
            drain_s = 0.0 if first is None else self._drain_s
            part, cancelled = await first_piece(anext(parts, None), drain_s)
            if cancelled:
                raise asyncio.CancelledError
            while part is not None:
                [completion] = part.outputs
                reason = completion.finish_reason
                if reason is not None and reason not in FINISHED:
                    raise errors.InstanceError(f"the engine ended the answer: {reason}")
                # All tokens so far, beginning with the context's. token_ids_diff omits that one
                # only where it comes with exactly one more.
                ids = completion.token_ids
                if list(ids[:1]) != told[:1] and told and ids:
                    raise errors.InstanceError(f"the answer begins with {ids[0]}, not {told[0]}")
                new = list(ids[len(told) :])
                told += new
                if new or reason is not None:
                    yield Piece(new, "" if reason is None else FINISHED[reason])
                part = await anext(parts, None)
        except errors.PDServeError:
            raise
        except Exception as error:
            raise errors.InstanceError(f"generation: {error!r}") from error
        finally:
            _abort(output)

    # --------------------------------------------------------------------- both

    def _begin(self, asked: Asked, params: Any, *, streaming: bool) -> Any:
        """Begin a request. Raises InvalidRequest or InstanceError."""
        arguments = sampling.arguments(asked, self._eos_ids, self._api.sampling_fields)
        salt = {"cache_salt": asked.tenant} if asked.tenant and self._api.has_salts else {}
        try:
            # By keyword: the order of its parameters differs between versions.
            return self._llm.generate_async(
                inputs=asked.prompt.tolist(),
                sampling_params=self._api.sampling_params(**arguments),
                streaming=streaming,
                disaggregated_params=params,
                **salt,
            )
        except (TypeError, ValueError) as error:
            raise errors.InvalidRequest(str(error)) from error
        except RuntimeError as error:
            raise errors.InstanceError(str(error)) from error

    async def report(self) -> Report:
        """Implements ``EngineTerms``."""
        blocks: dict[str, float] = {}
        events: Counter[str] = Counter()
        if self._shows_pool:
            async for stats in self._llm.get_stats_async(timeout=LOOK_S):
                blocks |= _blocks(stats.get("kvCacheStats") or {})
        if self._tells_events:
            async for event in self._llm.get_kv_cache_events_async(timeout=LOOK_S):
                events[event["data"]["type"]] += 1
        return Report(blocks, events)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._llm.shutdown)


def _blocks(stats: dict[str, float]) -> dict[str, float]:
    states = {"used": "usedNumBlocks", "free": "freeNumBlocks"}
    return {state: stats[name] for state, name in states.items() if name in stats}


def _abort(output: Any) -> None:
    """Abort a request, unless it has finished."""
    if not output.finished:
        output.abort()


def _fingerprint(
    version: str, model: Path, transceiver: dict[str, Any], wanted: LlmOptions, of: LlmArguments
) -> str:
    """Return what two engines must have in common.

    How experts are shared out is no part of it: it divides the MLPs among the ranks of tensor
    parallelism, and leaves attention as it is (tensorrt_llm/mapping.py).
    """
    pool = of.kv_cache_config
    layout = {
        "version": version,
        **transceiver,
        "backend": options.backend(wanted.cache_transceiver_config, os.environ),
        "pool": pool.dtype,
        "block": pool.tokens_per_block,
        "manager": pool.use_kv_cache_manager_v2,
        "dtype": of.dtype,
    }
    return f"{version}:{checkpoint.fingerprint(model, repr(layout))}"
