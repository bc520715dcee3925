"""Instances that may change roles: what of a deployment does not let them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pdserve.config.backend_models import KIND
from pdserve.config.deployment import Deployment
from pdserve.config.llm_options import LlmArguments

_OVERLAP = "disable_overlap_scheduler"


def problems(deployment: Deployment) -> Iterator[str]:
    """Yield the problems, in sentences that name the field, its value and what is allowed."""
    for server in deployment.servers:
        own = (*server.prefill, *server.decode)
        where = f"servers.{server.name}.flexible"
        for name in server.flexible:
            if name not in own:
                yield f"{where}: {name}; allowed: its instances, {', '.join(own)}"
            if server.flexible.count(name) > 1:
                yield f"{where}: {name} is named more than once"
    if not deployment.flexible:
        return
    kind = deployment.engine.kind
    if kind == KIND:
        names = ", ".join(sorted(deployment.flexible))
        yield (
            f"flexible: {names}: an engine of kind {KIND} is a model of another server, which has "
            "one role; allowed with torch, emulated and tensorrt_llm"
        )
    elif kind == "tensorrt_llm":
        yield from _differing(deployment)


def _differing(deployment: Deployment) -> Iterator[str]:
    """Yield what differs between the roles of TensorRT-LLM.

    Its engine stays as it is when its instance changes roles: context requests are refused by one
    with an overlap scheduler (docs/source/features/disagg-serving.md), and a link is between
    engines with the same arguments.
    """
    options = deployment.engine.tensorrt_llm
    prefill, decode = _arguments(options.prefill), _arguments(options.decode)
    prefill.setdefault(_OVERLAP, True)  # as `engines.tensorrt_llm.options.DEFAULTS`
    ranks = deployment.prefill.tensor_parallel, deployment.decode.tensor_parallel
    for name, one, other in (
        ("prefill.tensor_parallel and decode.tensor_parallel", *ranks),
        *(
            (
                f"engine.tensorrt_llm.prefill.{name} and .decode.{name}",
                prefill.get(name),
                decode.get(name),
            )
            for name in sorted({*prefill, *decode} - {_OVERLAP})
        ),
    ):
        if one != other:
            yield f"{name}: {one} and {other}; allowed with flexible instances: equal ones"
    for role, given in (("prefill", prefill), ("decode", decode)):
        if given.get(_OVERLAP) is not True:
            yield (
                f"engine.tensorrt_llm.{role}.{_OVERLAP}: {given.get(_OVERLAP)}; allowed with "
                "flexible instances: true, since context requests need it"
            )


def _arguments(arguments: LlmArguments) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(arguments)
    return found
