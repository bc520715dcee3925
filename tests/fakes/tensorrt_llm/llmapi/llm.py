"""The engine, and requests to it."""

from __future__ import annotations

import atexit
import inspect
import itertools
import weakref
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from tensorrt_llm._fake import models
from tensorrt_llm._fake.engine import Engine, Limits
from tensorrt_llm._fake.reports import Reports
from tensorrt_llm._fake.work import Answer
from tensorrt_llm.executor.result import GenerationResult, IterationResult
from tensorrt_llm.llmapi.links import Links
from tensorrt_llm.llmapi.llm_args import KvCacheConfig, TorchLlmArgs
from tensorrt_llm.llmapi.requests import Rules, prompt_of, work_for
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.version import OLDEST, SINCE_1_3

if TYPE_CHECKING:
    from tensorrt_llm.disaggregated_params import DisaggregatedParams
    from typing_extensions import Self

# Tokens of the KV cache where `KvCacheConfig.max_tokens` is None: the fake has no GPU to fill.
POOL_TOKENS = 8192

_LATER: dict[str, Any] = {
    **({} if OLDEST else {"trace_headers": None}),
    "_postproc_params": None,
    "scheduling_params": None,
    **({"conversation_params": None} if SINCE_1_3 else {}),
    **({} if OLDEST else {"cache_salt": None}),
    **({"priority": 0.5} if SINCE_1_3 else {}),
}
_PARAMETERS: dict[str, Any] = {
    "self": inspect.Parameter.empty,
    "inputs": inspect.Parameter.empty,
    "sampling_params": None,
    "lora_request": None,
    "prompt_adapter_request": None,
    "streaming": False,
    "kv_cache_retention_config": None,
    "disaggregated_params": None,
    **_LATER,
}
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in _PARAMETERS.items()
    ]
)


class RequestOutput(GenerationResult):
    """A request's results; only `LLM.generate_async` makes them."""


class LLM:
    """A model, and an engine that serves it.

    Raises:
        ValueError: an argument that there is not, or a value that it cannot have.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.args = args = TorchLlmArgs(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        kv = args.kv_cache_config or KvCacheConfig()
        transfers = args.cache_transceiver_config
        runtime = transfers._runtime if transfers is not None else None
        if runtime == "CPP" and transfers is not None:
            buffered = transfers.max_tokens_in_buffer or 0
            if buffered % kv.tokens_per_block:
                raise ValueError(
                    f"max_tokens_in_buffer {buffered} is no multiple of {kv.tokens_per_block}"
                )
        loaded = models.load(str(model), args.dtype)
        pool_tokens = kv.max_tokens or POOL_TOKENS
        limits = Limits(
            max_batch_size=args.max_batch_size or 2048,
            max_num_tokens=args.max_num_tokens or 8192,
            chunked=args.enable_chunked_prefill,
            pool_tokens=pool_tokens,
            tokens_per_block=kv.tokens_per_block,
            transfers=runtime is not None,
            timeout_s=transfers._timeout_s if transfers is not None else None,
        )
        self._stats: SimpleQueue[str] = SimpleQueue()
        self._events: SimpleQueue[str] = SimpleQueue()
        reports = Reports(
            kv.tokens_per_block,
            self._stats.put if args.enable_iter_perf_stats else None,
            self._events.put if kv.event_buffer_max_size and kv.enable_block_reuse else None,
        )
        self.tokenizer = None if skip_tokenizer_init else _tokenizer(tokenizer or model)
        self._ends = sorted(loaded.eos_ids)
        self._rules = Rules(
            max_seq_len=min(args.max_seq_len or pool_tokens, loaded.context_length, pool_tokens),
            overlapped=not args.disable_overlap_scheduler,
            stream_interval=args.stream_interval,
        )
        self._engine: Engine | None = Engine(loaded, limits, reports)
        self._links = Links(runtime, self._engine.address, self._engine.cache)
        self._ids = itertools.count(1)
        atexit.register(_shut_down, weakref.ref(self))

    def generate_async(self, *args: Any, **kwargs: Any) -> RequestOutput:
        """Request an answer to one prompt; an error of its link is raised from the results.

        Raises:
            RuntimeError: after `shutdown`.
            TypeError, ValueError: arguments that cannot be.
        """
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if self._engine is None:
            raise RuntimeError("LLM is shutting down")
        given = bound.arguments
        sampling_params = self._prepare(given["sampling_params"])
        disaggregated: DisaggregatedParams | None = given["disaggregated_params"]
        kind = (disaggregated and disaggregated.request_type) or "context_and_generation"
        if kind == "context_only":
            sampling_params.max_tokens = 1
        for name in ("lora_request", "prompt_adapter_request", "_postproc_params"):
            if given[name] is not None:
                raise NotImplementedError(f"{name}: not in the fake")
        prompt, ids = prompt_of(given["inputs"], self.tokenizer, sampling_params)
        most = self._engine.limits.max_num_tokens
        if not self.args.enable_chunked_prefill and kind != "generation_only" and len(ids) > most:
            raise ValueError(f"a prompt of {len(ids)} tokens; max_num_tokens is {most}")
        streaming = bool(given["streaming"])
        engine, links = self._engine, self._links
        result: RequestOutput
        try:
            work = work_for(
                kind, ids, sampling_params, disaggregated, self._rules, links, streaming=streaming
            )
        except ValueError as error:
            result = RequestOutput(
                next(self._ids), prompt, ids, sampling_params, disaggregated, streaming=streaming
            )
            result._inbox.put(Answer(error=error))
            return result
        result = RequestOutput(
            next(self._ids),
            prompt,
            ids,
            sampling_params,
            disaggregated,
            streaming=streaming,
            tokenizer=self.tokenizer,
            handed_over=lambda: links.made(work.id, disaggregated, len(ids)),
            abort=lambda: engine.abort(work),
        )
        work.send = result._inbox.put
        engine.submit(work)
        return result

    generate_async.__signature__ = _SIGNATURE  # type: ignore[attr-defined]

    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **kwargs: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Wait for the answers to a prompt, or to a list of them."""
        single = not isinstance(inputs, list) or isinstance(inputs[0], int)
        prompts = [inputs] if single else inputs
        options = {
            name: value if isinstance(value, list) else [value] * len(prompts)
            for name, value in {"sampling_params": sampling_params, **kwargs}.items()
        }
        results = [
            self.generate_async(prompt, **{name: values[at] for name, values in options.items()})
            for at, prompt in enumerate(prompts)
        ]
        for result in results:
            result.result()
        return results[0] if single else results

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return IterationResult(self._stats, timeout).get_results()

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult:
        """Return statistics of the engine's turns, with ``enable_iter_perf_stats``."""
        return IterationResult(self._stats, timeout)

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return IterationResult(self._events, timeout).get_results()

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        """Return events, with ``event_buffer_max_size`` and ``enable_block_reuse``."""
        return IterationResult(self._events, timeout)

    def shutdown(self) -> None:
        """End the engine, and free what it still holds."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _prepare(self, sampling_params: SamplingParams | None) -> SamplingParams:
        """Fill in the parameters in place."""
        if sampling_params is None:
            sampling_params = SamplingParams()
        if not isinstance(sampling_params, SamplingParams):
            raise TypeError(f"sampling_params: {type(sampling_params).__name__}")
        if sampling_params.end_id is None:
            if self.tokenizer is None:
                raise ValueError("without a tokenizer, sampling_params needs an end_id")
            sampling_params._setup(self.tokenizer, self._ends)
        return sampling_params


def _tokenizer(where: Any) -> Any:
    if not isinstance(where, str | Path):
        return where
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(where, local_files_only=True)


def _shut_down(reference: weakref.ref[LLM]) -> None:
    llm = reference()
    if llm is not None:
        with suppress(Exception):
            llm.shutdown()
