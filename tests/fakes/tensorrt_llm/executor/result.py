"""The results of a request, as they come."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm._fake.inbox import Inbox
from tensorrt_llm._fake.work import Answer
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.sampling_params import SamplingParams


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a request; it grows while the request's results are read."""

    index: int
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] | None = field(default_factory=list)
    prompt_logprobs: list[Any] | None = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    disaggregated_params: DisaggregatedParams | None = None
    request_perf_metrics: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids or ())

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return (self.token_ids or [])[self._last_token_ids_len :]


class GenerationResult:
    """The results of a request, for one reader; each step of the iteration is the same object."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        disaggregated_params: DisaggregatedParams | None,
        *,
        streaming: bool,
        tokenizer: Any = None,
        handed_over: Callable[[], DisaggregatedParams] | None = None,
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.disaggregated_params = disaggregated_params
        self.outputs = [CompletionOutput(0)]
        self.context_logits = None
        self._streaming = streaming
        self._tokenizer = tokenizer
        self._handed_over = handed_over
        self._abort = abort
        self._aborted = False
        self._done = False
        self._first = True
        self._inbox: Inbox[Answer] = Inbox()

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        """End it soon, with the finish reason "cancelled"."""
        self._abort()
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for its end. Raises: RequestError; queue.Empty: no result came in time."""
        while not self._done:
            self._take(self._inbox.get(timeout))
        return self

    async def aresult(self) -> GenerationResult:
        while not self._done:
            self._take(await self._inbox.aget())
        return self

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        return self.aresult().__await__()

    def __iter__(self) -> GenerationResult:
        return self

    def __next__(self) -> GenerationResult:
        if self._done:
            raise StopIteration
        self._take(self._inbox.get())
        return self

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._done:
            raise StopAsyncIteration
        self._take(await self._inbox.aget())
        return self

    def _take(self, answer: Answer) -> None:
        self._done = answer.last
        if answer.error is not None:
            raise RequestError(str(answer.error)) from answer.error
        params, output = self.disaggregated_params, self.outputs[0]
        kind = params.request_type if params is not None else None
        if kind == "context_only" and answer.reason != "cancelled" and self._handed_over:
            params = self.disaggregated_params = self._handed_over()
            params.first_gen_tokens = answer.tokens
        output.disaggregated_params = params
        assert output.token_ids is not None
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(answer.tokens)
        if self._first and kind == "generation_only" and self._streaming:
            # The context engine's first token has been answered there.
            output._last_token_ids_len = min(1, len(output.token_ids))
        self._first = False
        output.finish_reason = answer.reason
        if answer.reason == "stop":
            self._strip(output)
        if self._tokenizer is not None and self.sampling_params.detokenize:
            output._last_text_len = len(output.text)
            output.text = self._tokenizer.decode(
                output.token_ids, skip_special_tokens=self.sampling_params.skip_special_tokens
            )

    def _strip(self, output: CompletionOutput) -> None:
        assert output.token_ids is not None
        if output.token_ids[-1:] == [self.sampling_params.end_id]:
            return
        for reason, word in self.sampling_params._get_stop_reasons_and_words():
            if word and output.token_ids[-len(word) :] == word:
                output.stop_reason = reason
                if not self.sampling_params.include_stop_str_in_output:
                    output.token_ids = output.token_ids[: -len(word)]
                return


class IterationResult:
    """Statistics or events: an async iterator of dicts, which ends when none comes in time."""

    def __init__(self, source: queue.SimpleQueue[str], timeout: float | None) -> None:
        self._source = source
        self._timeout = timeout

    def get_results(self) -> list[dict[str, Any]]:
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(json.loads(self._source.get(timeout=self._timeout)))
        return found

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            item = await asyncio.to_thread(self._source.get, timeout=self._timeout)
        except queue.Empty:
            raise StopAsyncIteration from None
        parsed: dict[str, Any] = json.loads(item)
        return parsed
