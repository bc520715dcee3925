"""The installed ``tensorrt_llm``: imported as it wants to be, and what this version of it has."""

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
"""What the code was written by: 1.0 to the 1.3 series."""
# What a launcher has left would make its workers join, or wait for, a job that is not theirs. What
# configures MPI stays. So, by other means, does triton_backend/all_models/llmapi.
MPI_JOB = ("OMPI_", "ORTE_", "PMIX_", "PMI_")
MPI_SETTINGS = ("OMPI_MCA_", "PMIX_MCA_")
MPI_JOB_SETTINGS = "OMPI_MCA_orte_"
# Looked at once, by CUDA and by the workers' launcher.
GPUS = ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES")


class Api:
    """What is called and set, found by inspection: versions differ.

    Args:
        gpus: that the process is to use; none: those it sees.

    Raises:
        DeploymentError: it cannot be imported, or is of a version that is not known here.
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
        """Requests of both roles may carry an id that was made outside, for the whole fleet."""
        return "disagg_request_id" in self.link_fields

    @property
    def has_timeout(self) -> bool:
        """A KV cache that nobody takes is let go of after a time."""
        return "kv_transfer_timeout_ms" in self.transceiver_fields

    @property
    def has_runtimes(self) -> bool:
        """There is a choice of transceivers."""
        return "transceiver_runtime" in self.transceiver_fields


def _is_of_a_job(variable: str) -> bool:
    if variable.startswith(MPI_JOB_SETTINGS):
        return True
    return variable.startswith(MPI_JOB) and not variable.startswith(MPI_SETTINGS)


def check_version(version: str) -> None:
    """Raises: DeploymentError: not of a series that is known here."""
    try:
        known = Version(version) in VERSIONS
    except InvalidVersion:
        known = False
    if not known:
        raise DeploymentError(f"tensorrt_llm {version}; allowed: 1.0 up to 1.3.x")


def field_names(of: Any) -> frozenset[str]:
    """Names of the fields of a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(of):
        return frozenset(one.name for one in dataclasses.fields(of) if one.init)
    if hasattr(of, "model_fields"):
        return frozenset(of.model_fields)
    return frozenset(inspect.signature(of).parameters)
