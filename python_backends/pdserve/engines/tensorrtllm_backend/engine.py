"""Legacy (images up to 26.07): a model of the C++ backend, reached over gRPC.

Each request is a separate stream on one connection: ending the stream cancels that request and no
other.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from pdserve import config, errors
from pdserve.connections import GRPC_OPTIONS
from pdserve.engines import checkpoint
from pdserve.engines.external import Asked, Context, Piece, Report
from pdserve.engines.tensorrtllm_backend import tensors
from pdserve.engines.tensorrtllm_backend.tensors import Answer, Tensors

_log = logging.getLogger(__name__)


def new(
    name: str,
    role: config.Role,  # noqa: ARG001 - the model has it
    deployment: config.Deployment,
    context_length: int,
) -> BackendModel:
    """Make the engine of an instance; see ``BackendModel``."""
    _log.warning(
        "%s: engine.kind tensorrtllm_backend is legacy: Triton's images later than 26.07 have no "
        "such backend, and docs/tensorrt-llm.md says how to move to tensorrt_llm. Tenants share "
        "cached prefixes if enable_kv_cache_reuse is true in the model",
        name,
    )
    return BackendModel(name, deployment, context_length)


class BackendModel:
    """One model in one role: a ``ContextEngine`` or a ``GenerationEngine``.

    Args:
        context_length: context length of the model.

    Raises:
        DeploymentError: the model's files do not say how an answer ends.
    """

    def __init__(self, name: str, deployment: config.Deployment, context_length: int) -> None:
        place = deployment.engine.models[name]
        model = Path(deployment.model)
        self._place = place
        self._client: InferenceServerClient | None = None
        self._eos_ids = checkpoint.eos_ids(model)
        # The backend ends an answer before its end_id; here, as with other engines, that is its
        # last token.
        self._cut_off = self._eos_ids[0]
        # How long an engine really keeps a KV cache can be neither set nor queried from here.
        self.keeps_s = deployment.prefill.kept_s
        self.context_length = context_length
        self.vocabulary = checkpoint.vocabulary(model)
        self.fingerprint = f"tensorrtllm:{checkpoint.fingerprint(model, '')}"

    async def context(self, asked: Asked, keep: bool) -> Context:
        """Implements ``ContextEngine``."""
        request = tensors.request(asked, self._eos_ids, streaming=False)
        kind = {tensors.REQUEST_TYPE: tensors.CONTEXT} if keep else {}
        async with aclosing(self._answers(request, kind)) as answers:
            made = [answer async for answer in answers]
        if len(made) != 1:
            raise errors.InstanceError(f"{self._place.model}: {len(made)} responses to a context")
        [(ids, link)] = made
        if keep and ids and not link:
            raise errors.InstanceError(f"{self._place.model}: a context without {tensors.LINK}")
        token = ids[0] if ids else self._cut_off
        return Context(token, token in self._eos_ids, link, 0)

    async def generate(
        self, asked: Asked, first: int | None, link: bytes
    ) -> AsyncGenerator[Piece, None]:
        """Implements ``GenerationEngine``."""
        request = tensors.request(asked, self._eos_ids, streaming=True, link=link)
        kind = {} if first is None else {tensors.REQUEST_TYPE: tensors.GENERATION}
        told, untold = list[int](), list[int]()
        async with aclosing(self._answers(request, kind)) as answers:
            async for ids, _ in answers:
                untold += ids
                if first is not None and not told and ids:
                    # It repeats the context's token, for clients that have not passed it on yet.
                    if ids[0] != first:
                        raise errors.InstanceError(f"the answer begins with {ids[0]}, not {first}")
                    del untold[0]
                told += ids
                # The last tokens are sent with the finish reason, which is not in any response.
                if untold and len(told) < asked.max_tokens:
                    yield Piece(untold, "")
                    untold = []
        if first is not None and not told:
            raise errors.InstanceError(f"{self._place.model}: an answer without any token")
        eos = bool(told) and told[-1] in self._eos_ids
        stopped = not asked.ignore_eos and (eos or len(told) < asked.max_tokens)
        if stopped and not eos:
            untold.append(self._cut_off)
        yield Piece(untold, "stop" if stopped else "length")

    async def _answers(
        self, request: Tensors, kind: dict[str, str]
    ) -> AsyncGenerator[Answer, None]:
        """Yield the responses to a request; closing early cancels it. Raises InstanceError."""
        inputs = []
        for name, array in request.items():
            tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)

        async def only() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self._place.model,
                "inputs": inputs,
                "request_id": uuid.uuid4().hex,
                "parameters": kind,
                "enable_empty_final_response": True,
            }

        if self._client is None:
            self._client = InferenceServerClient(self._place.address, channel_args=GRPC_OPTIONS)
        responses = self._client.stream_infer(only())
        try:
            async for result, error in responses:
                if error is not None:
                    raise errors.InstanceError(f"{self._place.model}: {error.message()}")
                response = result.get_response()
                if response.outputs:
                    yield tensors.answer(
                        {one.name: result.as_numpy(one.name) for one in response.outputs}
                    )
                if response.parameters["triton_final_response"].bool_param:
                    return
        except (grpc.RpcError, InferenceServerException) as error:
            raise errors.InstanceError(f"{self._place.address}: {error}") from error
        finally:
            responses.cancel()

    async def report(self) -> Report:
        """Implements ``EngineTerms``; the backend has its own metrics."""
        return Report({}, {})

    async def close(self) -> None:
        """Close the connection; the server is not ours."""
        if self._client is not None:
            await self._client.close()
