"""The installed ``tensorrt_llm``: its import, and the features of its version."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pdserve.engines.tensorrt_llm import sampling
from pdserve.errors import DeploymentError

_log = logging.getLogger(__name__)

VERSIONS = SpecifierSet(">=1.0,<=1.4.0rc4", prereleases=True)
"""Versions whose source was read; of another one only the names that are used are known."""
# The classes that are used and, of each, the attributes, fields or parameters that every request
# needs. Those that depend on options are checked where they are given.
NEEDED = {
    "LLM": ("generate_async", "get_stats_async", "get_kv_cache_events_async", "shutdown"),
    "LLM.generate_async": ("inputs", "sampling_params", "streaming", "disaggregated_params"),
    "TorchLlmArgs": (
        *("model", "backend", "skip_tokenizer_init", "tensor_parallel_size", "max_batch_size"),
        *("kv_cache_config", "cache_transceiver_config", "disable_overlap_scheduler"),
    ),
    "SamplingParams": sampling.NEEDED,
    "DisaggregatedParams": ("request_type", "ctx_request_id"),
    "KvCacheConfig": ("enable_block_reuse",),
    "CacheTransceiverConfig": ("backend",),
    "RequestOutput": ("aresult", "abort", "finished", "__aiter__", "__anext__"),
    "CompletionOutput": ("token_ids", "finish_reason", "disaggregated_params"),
}
# Prefixes of the variables of an MPI launcher that would make its workers join, or wait for, a job
# that is not theirs. Variables that configure MPI are kept. triton_backend/all_models/llmapi does
# the same by other means.
MPI_JOB = ("OMPI_", "ORTE_", "PMIX_", "PMI_")
MPI_SETTINGS = ("OMPI_MCA_", "PMIX_MCA_")
MPI_JOB_SETTINGS = "OMPI_MCA_orte_"
# Read once, by CUDA and by the workers' launcher.
GPUS = ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES")


class Api:
    """The classes and fields of the API, found by inspection, since versions differ.

    What is there decides, not the version: a version that was not read is only warned of.

    Args:
        gpus: GPUs that the process may use; none: all that it sees.

    Raises:
        DeploymentError: the package cannot be imported, or lacks a name that every request needs.
    """

    def __init__(self, gpus: Sequence[int]) -> None:
        for name in filter(_is_of_a_job, list(os.environ)):
            del os.environ[name]
        if gpus:
            os.environ.update(dict.fromkeys(GPUS, ",".join(map(str, gpus))))
        try:
            self._package = importlib.import_module("tensorrt_llm")
            llmapi: Any = importlib.import_module("tensorrt_llm.llmapi")
        except ImportError as error:
            raise DeploymentError(f"engine tensorrt_llm: it cannot be imported: {error}") from error
        self.version: str = self._package.__version__
        check_names(self.version, llmapi)
        if (unread := unread_version(self.version)) is not None:
            _log.warning("%s", unread)
        self.llm = llmapi.LLM
        self.sampling_params = llmapi.SamplingParams
        self.disaggregated_params = llmapi.DisaggregatedParams
        self.kv_cache_config = llmapi.KvCacheConfig
        self.cache_transceiver_config = llmapi.CacheTransceiverConfig
        self.argument_fields = field_names(llmapi.TorchLlmArgs)
        self.sampling_fields = field_names(self.sampling_params)
        self.link_fields = field_names(self.disaggregated_params)
        self.pool_fields = field_names(self.kv_cache_config)
        self.transceiver_fields = field_names(self.cache_transceiver_config)
        self.request_fields = field_names(self.llm.generate_async)
        self.runtimes = frozenset(choices(self.cache_transceiver_config, "transceiver_runtime"))
        """Values of ``transceiver_runtime``; empty: there is no such choice."""

    @property
    def has_own_ids(self) -> bool:
        """Tell whether requests of both roles may carry an id unique in the deployment."""
        return "disagg_request_id" in self.link_fields

    @property
    def has_timeout(self) -> bool:
        """Tell whether a KV cache that no decode takes is freed after a time."""
        return "kv_transfer_timeout_ms" in self.transceiver_fields

    @property
    def has_salts(self) -> bool:
        """Tell whether requests may name whose cached prefixes they share."""
        return "cache_salt" in self.request_fields


def _is_of_a_job(variable: str) -> bool:
    if variable.startswith(MPI_JOB_SETTINGS):
        return True
    return variable.startswith(MPI_JOB) and not variable.startswith(MPI_SETTINGS)


def check_names(version: str, llmapi: Any) -> None:
    """Check that ``tensorrt_llm.llmapi`` has what every request needs.

    Raises:
        DeploymentError: names are missing; the message has them all.
    """
    missing = []
    for path, names in NEEDED.items():
        class_name, _, method = path.partition(".")
        of = getattr(llmapi, class_name, None)
        if of is None:
            missing.append(class_name)
        elif not method or hasattr(of, method):  # else it is missing from its class already
            known = field_names(getattr(of, method) if method else of) | set(dir(of))
            missing += [f"{path}.{name}" for name in names if name not in known]
    if missing:
        raise DeploymentError(
            f"engine tensorrt_llm: tensorrt_llm {version} has no {', '.join(missing)}; versions "
            f"that were read: {VERSIONS}"
        )


def unread_version(version: str) -> str | None:
    """Return a warning if a version's source was not read; None: it was."""
    try:
        if Version(version) in VERSIONS:
            return None
    except InvalidVersion:
        pass
    return (
        f"tensorrt_llm {version!r} is none of the versions that were read ({VERSIONS}); it has "
        "every name that is used, but their meaning may have changed"
    )


def field_names(of: Any) -> frozenset[str]:
    """Return the names that a dataclass, a pydantic model or a function takes, or a class has."""
    if dataclasses.is_dataclass(of):
        return frozenset(one.name for one in dataclasses.fields(of) if one.init)
    if hasattr(of, "model_fields"):
        return frozenset(of.model_fields)
    return frozenset(dir(of) if inspect.isclass(of) else inspect.signature(of).parameters)


def choices(of: Any, field: str) -> Iterator[str]:
    """Yield the literal strings that a field of a pydantic model may have."""
    parameter = inspect.signature(of).parameters.get(field)
    todo = [parameter.annotation] if parameter else []
    while todo:
        kind = todo.pop()
        if typing.get_origin(kind) is typing.Literal:
            yield from (value for value in typing.get_args(kind) if isinstance(value, str))
        else:
            todo += typing.get_args(kind)
