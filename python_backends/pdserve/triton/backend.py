"""The part of Triton's Python backend that every model here needs."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
import uvloop
from numpy.typing import NDArray

from pdserve import config, errors, pools, supervision
from pdserve.node import heartbeat
from pdserve.node.heartbeat import Heartbeat

BEAT_S = 0.25
CLOSE_S = 5.0
# Threads for slow work outside the loop: to publish metrics, to tokenize long texts, to copy.
ASIDE = 8


def deployment_path(args: dict[str, str]) -> Path:
    """Return the path of the deployment.yaml beside the models of this repository."""
    return Path(args["model_repository"]).parent / "deployment.yaml"


def folder(args: dict[str, str]) -> Path:
    """Return the folder of this server, which ``pdctl`` has made; the repository is in it."""
    return deployment_path(args).parent.parent


def deployment(args: dict[str, str]) -> config.Deployment:
    return config.load(deployment_path(args))


def inputs(args: dict[str, str]) -> tuple[str, ...]:
    """Return the names of a model's inputs, in the order of its configuration."""
    return tuple(one["name"] for one in json.loads(args["model_config"])["input"])


def own_heartbeat(args: dict[str, str], threads: int) -> Heartbeat:
    """Return the heartbeat of a model's process; without ``pdctl`` no watchdog reads it."""
    token = os.environ.get("PDSERVE_SHM_PREFIX")
    return Heartbeat(heartbeat.path(token, args["model_name"]) if token else None, threads)


def tensors(request: Any) -> dict[str, NDArray[Any]]:
    """Return a request's inputs by name, each with a batch dimension of one.

    Raises:
        InvalidRequest: the batch has another size, or strings do not fill their buffer.
    """
    inputs = {tensor.name(): _array(tensor) for tensor in request.inputs()}
    for name, tensor in inputs.items():
        if len(tensor) != 1:
            raise errors.InvalidRequest(
                f"{name}: a batch of {len(tensor)}; one prompt in a request is allowed"
            )
    return inputs


def _array(tensor: Any) -> NDArray[Any]:
    try:
        return tensor.as_numpy()  # type: ignore[no-any-return]
    except Exception as error:  # only a client's bytes decide whether it works
        raise errors.InvalidRequest(f"{tensor.name()}: no tensor can be read from it") from error


def parameters(request: Any) -> dict[str, Any]:
    """Return a request's parameters.

    Raises:
        InvalidRequest: one of them is not UTF-8, or all of them are no JSON.
    """
    try:
        return json.loads(request.parameters() or "{}")  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        raise errors.InvalidRequest(_not_utf8(error.object)) from None  # it holds all of them
    except ValueError:
        raise errors.InvalidRequest("the request parameters are no JSON") from None


def _not_utf8(data: bytes) -> str:
    """Say which of the parameters is not UTF-8, and at which byte."""
    for name, value in json.loads(data.decode(errors="surrogateescape")).items():
        for part in (name, value) if isinstance(value, str) else (name,):
            try:
                part.encode("utf-8", "surrogateescape").decode()
            except UnicodeDecodeError as error:
                return f"{errors.shown(name)}: invalid UTF-8 at byte {error.start}"
    return "the request parameters are not valid UTF-8"


def answered(request: Any, answer: Callable[[Any], Any], heartbeat: Heartbeat) -> Any:
    """Return the response of ``answer`` to a request, or the error response if it fails."""
    try:
        return answer(request)
    except BaseException as failure:  # a panic of the tokenizers library is no Exception
        return failed(failure)
    finally:
        heartbeat.worked(0)


def failed(failure: BaseException) -> Any:
    """Return the response to a request that has failed.

    An internal error is reported with an id that is in the log, and with no more than
    ``errors.loggable`` says of it.
    """
    if isinstance(failure, errors.PDServeError) and failure.code != errors.PDServeError.code:
        return error(failure)
    number = secrets.token_hex(4)
    told = errors.loggable(failure)
    pb_utils.Logger.log_error(f"error {number}: {told}")
    said = errors.brief(failure) if isinstance(failure, errors.PDServeError) else told
    return error(errors.PDServeError(f"{said} (error {number} in the server's log)"))


def error(failure: errors.PDServeError) -> Any:
    """Return the Triton response for an error.

    The message contains the code, too: a gRPC stream passes on the text only, and HTTP's generate
    answers every error of a decoupled model with 400.
    """
    code = getattr(pb_utils.TritonError, failure.code)
    message = f"{failure.code}: {failure}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def text(name: str, *values: str) -> Any:
    """Return a BYTES tensor [1, n]."""
    array = np.array([[value.encode() for value in values]], dtype=object)
    return pb_utils.Tensor(name, array)


def _end_process(reason: str) -> None:
    """End this stub, so that its watchdog restarts it. Triton's log has its stderr."""
    # Not by Triton's logger, which gives lines to a thread that would end before it sends them.
    with suppress(OSError, ValueError):
        print(f"pdserve: {reason}\npdserve: this process ends", file=sys.stderr, flush=True)
    os._exit(1)


class _Loop(uvloop.Loop):
    """A loop with a finer clock: uvloop's own counts whole milliseconds."""

    def time(self) -> float:
        return time.monotonic()


class LoopThread:
    """An event loop in its own thread, from a model's ``initialize`` to its ``finalize``.

    The stub's own loop is not used: it runs only while requests do, and keeps every ``execute``
    that ends before it has been noted (seen in 24.10).

    If work that should run here or in a thread as long as the model fails, the process ends.

    Args:
        heartbeat: counts the loop as its first thread.
        threads: number of threads of the loop's default executor.

    Raises:
        DeploymentError: the threads cannot be started.
    """

    def __init__(self, heartbeat: Heartbeat, threads: int = ASIDE) -> None:
        self._heartbeat = heartbeat
        self._loop = _Loop()
        self._loop.set_default_executor(pools.started(threads, "aside"))
        supervision.install(self._loop, _end_process)
        self._loop.call_soon(self._beat)
        self._thread = supervision.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Call ``function`` in the loop, soon."""
        self._loop.call_soon_threadsafe(function, *args)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the loop and wait for it, CLOSE_S seconds at most."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CLOSE_S)

    def _beat(self) -> None:
        self._heartbeat.turned(0)
        self._loop.call_later(BEAT_S, self._beat)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
