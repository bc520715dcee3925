"""A deployment's options as arguments of the installed version, and warnings about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from pdserve import config
from pdserve.config.llm_options import (
    BACKEND_VARIABLES,
    CacheTransceiverConfig,
    KvCacheConfig,
    LlmArguments,
)
from pdserve.engines.tensorrt_llm.api import Api
from pdserve.errors import DeploymentError

# docs/source/features/disagg-serving.md: context requests need the scheduler without overlap; 1.0
# refuses them otherwise.
DEFAULTS: dict[config.Role, dict[str, Any]] = {
    "prefill": {"disable_overlap_scheduler": True},
    "decode": {},
}
WHERE = "engine.tensorrt_llm"


def transceiver(api: Api, wanted: CacheTransceiverConfig, lease_s: float) -> dict[str, Any]:
    """Return the arguments of CacheTransceiverConfig.

    Raises:
        DeploymentError: this version has no such option.
    """
    options = {"backend": wanted.backend, **msgspec.to_builtins(wanted)}
    if api.has_timeout:  # otherwise a KV cache that no decode has taken is never freed
        options["kv_transfer_timeout_ms"] = int(lease_s * 1e3)
    runtime = options.setdefault("transceiver_runtime", "auto")
    if runtime == "auto" and "auto" not in api.runtimes:
        if wanted.transceiver_runtime is not None:
            raise DeploymentError(
                f"{WHERE}.cache_transceiver_config.transceiver_runtime: tensorrt_llm {api.version} "
                f"has no auto; allowed: {', '.join(sorted(api.runtimes)) or 'not to be set'}"
            )
        del options["transceiver_runtime"]
    _check(api, "cache_transceiver_config", options, api.transceiver_fields)
    return options


def pool(api: Api, role: config.Role, wanted: KvCacheConfig) -> dict[str, Any]:
    """Return the arguments of KvCacheConfig; without salts, no prefix is reused unless asked for.

    Raises:
        DeploymentError: this version has no such option.
    """
    options: dict[str, Any] = msgspec.to_builtins(wanted)
    if not api.has_salts:
        options.setdefault("enable_block_reuse", False)
    _check(api, f"{role}.kv_cache_config", options, api.pool_fields)
    return options


def arguments(api: Api, role: config.Role, wanted: LlmArguments) -> dict[str, Any]:
    """Return further arguments of LLM.

    Raises:
        DeploymentError: this version has no such option.
    """
    options = wanted.given()
    _check(api, role, options, api.argument_fields)
    return DEFAULTS[role] | options


def _check(api: Api, where: str, options: Collection[str], known: Collection[str]) -> None:
    for name in sorted(set(options) - set(known)):
        raise DeploymentError(
            f"{WHERE}.{where}.{name}: tensorrt_llm {api.version} has no such option; allowed: "
            f"{', '.join(sorted(known))}"
        )


def backend(wanted: CacheTransceiverConfig, environment: Mapping[str, str]) -> str:
    """Return the backend that is used in this environment."""
    if wanted.backend != "DEFAULT":
        return wanted.backend
    return next((BACKEND_VARIABLES[name] for name in _chosen(environment)), "NIXL")


def _chosen(environment: Mapping[str, str]) -> list[str]:
    return [name for name in BACKEND_VARIABLES if environment.get(name) == "1"]


def warnings(
    api: Api, deployment: config.Deployment, role: config.Role, environment: Mapping[str, str]
) -> Iterator[str]:
    """Yield what a user should know of a role's engines, in whole sentences."""
    options = deployment.engine.tensorrt_llm
    used = backend(options.cache_transceiver_config, environment)
    for name in _chosen(environment):
        if BACKEND_VARIABLES[name] != used:
            yield f"{name} is set, but the backend of the cache transceiver is {used}"
        elif options.cache_transceiver_config.backend == "DEFAULT":
            yield (
                f"{name} chooses the backend of the cache transceiver, {used}, on this server "
                f"alone; set {WHERE}.cache_transceiver_config.backend"
            )
    lease_s = deployment.prefill.kept_s
    if lease_s < config.EXTERNAL_LEASE_S:
        yield (
            f"prefill.lease_s: {lease_s:g} is also the time limit of a transfer, which runs while "
            f"a request waits in the decode's queue; at least {config.EXTERNAL_LEASE_S:g} is safe"
        )
    if role == "prefill" and not api.has_timeout:
        yield (
            f"tensorrt_llm {api.version} keeps for ever what no decode takes; each such KV cache "
            "costs a slot until the instance is restarted"
        )
    if not api.has_salts:
        reused = getattr(options, role).kv_cache_config.enable_block_reuse
        yield f"tensorrt_llm {api.version} cannot keep the cached prefixes of tenants apart: " + (
            "enable_block_reuse is true, so tenants can find out what others have asked"
            if reused
            else "none is reused, unless kv_cache_config.enable_block_reuse is true"
        )
