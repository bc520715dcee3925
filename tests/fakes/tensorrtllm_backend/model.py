"""The models `context` and `generation`: an engine behind the C++ backend's tensors."""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from tensorrt_llm._fake import models
from tensorrt_llm._fake.engine import Engine, Limits
from tensorrt_llm._fake.reports import Reports
from tensorrt_llm._fake.work import Answer, Work
from tensorrtllm_backend.params import ContextPhaseParams
from tensorrtllm_backend.requests import KINDS, SampleRequest, request_of, samples

from pdserve.node.heartbeat import Heartbeat
from pdserve.triton.outbox import Outbox

TOKENS_PER_BLOCK = 32
NEEDED = ("output_ids", "sequence_length")


class Model:
    """An instance of either model; the request decides what is computed."""

    def __init__(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)

        def parameter(name: str) -> str:
            return str(config["parameters"][name]["string_value"])

        self._exclude_input = parameter("exclude_input_in_output") == "true"
        tokens = int(parameter("max_tokens_in_paged_kv_cache"))
        limits = Limits(
            max_batch_size=int(parameter("max_batch_size")),
            max_num_tokens=tokens,
            chunked=False,
            pool_tokens=tokens,
            tokens_per_block=TOKENS_PER_BLOCK,
            transfers=True,
            timeout_s=None,
        )
        model = models.load(parameter("gpt_model_path"), parameter("dtype"))
        self._engine = Engine(model, limits, Reports(TOKENS_PER_BLOCK, None, None))
        self._ids = itertools.count(1)
        self._open: dict[str, list[Work]] = {}
        """Requests by their keys in the outbox."""
        self._named: dict[str, str] = {}
        """Keys by the clients' request ids."""
        period_s = float(parameter("cancellation_check_period_ms")) / 1e3
        self._outbox = Outbox(period_s, self._cancel, Heartbeat(None, threads=2), thread=1)

    def close(self) -> None:
        self._engine.close()
        self._outbox.close()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            key = str(next(self._ids))
            self._outbox.open(key, request.get_response_sender())
            try:
                self._begin(key, request)
            except ValueError as error:
                self._open.pop(key, None)
                self._outbox.send(key, _failed(error), last=True)

    def _begin(self, key: str, request: Any) -> None:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        name = request.request_id()
        if "stop" in tensors and tensors["stop"].any():
            if not name:
                raise ValueError("stop needs the id of the request that is to be stopped")
            self._cancel(self._named.get(name, ""))
            self._outbox.send(key, None, last=True)
            return
        wanted = request.requested_output_names()
        missing = [name for name in NEEDED if wanted and name not in wanted]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be among the requested outputs")
        kind = json.loads(request.parameters() or "{}").get("request_type", "")
        if kind and kind not in KINDS:
            pb_utils.Logger.log_error(f"request_type {kind!r} is not known")
        batch = [
            request_of(
                next(self._ids),
                KINDS.get(kind, "context_and_generation"),
                sample,
                exclude_input=self._exclude_input,
            )
            for sample in samples(tensors)
        ]
        if not self._decoupled and (len(batch) > 1 or batch[0].streaming):
            raise ValueError("batches and streaming need a decoupled model")
        self._open[key] = [one.work for one in batch]
        if name:
            self._named[name] = key
        for index, one in enumerate(batch):
            one.work.send = partial(self._answer, key, name, one, index if len(batch) > 1 else None)
            self._engine.submit(one.work)

    def _cancel(self, key: str) -> None:
        for work in list(self._open.get(key, ())):
            self._engine.abort(work)

    def _answer(
        self, key: str, name: str, one: SampleRequest, index: int | None, answer: Answer
    ) -> None:
        """Send an answer; called in the engine's thread."""
        last = False
        if answer.last:
            works = self._open[key]
            works.remove(one.work)
            last = not works
            if last:
                del self._open[key]
                self._named.pop(name, None)
        response = self._response(one, index, answer) if answer.error is None else None
        self._outbox.send(key, response or _failed(answer.error), last=last)

    def _response(self, one: SampleRequest, index: int | None, answer: Answer) -> Any:
        work = one.work
        ids = answer.tokens[:-1] if answer.tokens[-1:] == [work.end_id] else answer.tokens
        if not (one.streaming or one.exclude_input):
            ids = [*work.prompt.tolist(), *ids]
        tensors: dict[str, NDArray[Any]] = {
            "output_ids": np.array(ids, np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(ids)]], np.int32),
        }
        if work.kind == "context_only":
            params = ContextPhaseParams(
                list(answer.tokens), work.id, self._engine.address, self._engine.cache
            )
            tensors["context_phase_params"] = params.serialize()[None]
        counts = {
            "batch_index": index,
            "num_input_tokens": len(work.prompt) if one.counts[0] else None,
            "num_output_tokens": len(ids) if one.counts[1] else None,
        }
        tensors |= {
            tensor: np.array([[count]], np.int32)
            for tensor, count in counts.items()
            if count is not None
        }
        return pb_utils.InferenceResponse([_tensor(*pair) for pair in tensors.items()])


def _tensor(name: str, array: NDArray[Any]) -> Any:
    return pb_utils.Tensor(name, array)


def _failed(error: Exception | None) -> Any:
    message = pb_utils.TritonError(f"the request failed: {error}", pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(error=message)
