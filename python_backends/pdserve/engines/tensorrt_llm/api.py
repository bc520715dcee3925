"""The installed ``tensorrt_llm``: its import, and the features of its version."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from pdserve.errors import DeploymentError

VERSIONS = SpecifierSet(">=1.0,<1.4.dev0", prereleases=True)
"""Versions that the code was written for: 1.0 to the 1.3 series."""
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

    Args:
        gpus: GPUs that the process may use; none: all that it sees.

    Raises:
        DeploymentError: the package cannot be imported, or its version is not supported.
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
        check_version(self.version)
        self.llm = llmapi.LLM
        self.sampling_params = llmapi.SamplingParams
        self.disaggregated_params = llmapi.DisaggregatedParams
        self.kv_cache_config = llmapi.KvCacheConfig
        self.cache_transceiver_config = llmapi.CacheTransceiverConfig
        self.sampling_fields = field_names(self.sampling_params)
        self.link_fields = field_names(self.disaggregated_params)
        self.transceiver_fields = field_names(self.cache_transceiver_config)

    @property
    def has_own_ids(self) -> bool:
        """Tell whether requests of both roles may carry an id unique in the deployment."""
        return "disagg_request_id" in self.link_fields

    @property
    def has_timeout(self) -> bool:
        """Tell whether a KV cache that no decode takes is freed after a time."""
        return "kv_transfer_timeout_ms" in self.transceiver_fields

    @property
    def has_runtimes(self) -> bool:
        """Tell whether the transceiver can be chosen."""
        return "transceiver_runtime" in self.transceiver_fields


def _is_of_a_job(variable: str) -> bool:
    if variable.startswith(MPI_JOB_SETTINGS):
        return True
    return variable.startswith(MPI_JOB) and not variable.startswith(MPI_SETTINGS)


def check_version(version: str) -> None:
    """Check the version. Raises DeploymentError if it is not supported."""
    try:
        known = Version(version) in VERSIONS
    except InvalidVersion:
        known = False
    if not known:
        raise DeploymentError(f"tensorrt_llm {version}; allowed: 1.0 up to 1.3.x")


def field_names(of: Any) -> frozenset[str]:
    """Return the names of the fields of a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(of):
        return frozenset(one.name for one in dataclasses.fields(of) if one.init)
    if hasattr(of, "model_fields"):
        return frozenset(of.model_fields)
    return frozenset(inspect.signature(of).parameters)
