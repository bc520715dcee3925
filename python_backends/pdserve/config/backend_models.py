"""Legacy (images up to 26.07): the models of Triton's C++ backend that compute for instances."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated

from msgspec import Meta, Struct

from pdserve.config import addresses

KIND = "tensorrtllm_backend"


class TritonModel(Struct, frozen=True, forbid_unknown_fields=True):
    """A model of an existing Triton server."""

    address: Annotated[str, Meta(pattern=r"^[^\s/]+:[0-9]{1,5}\Z")]
    """host:port of its gRPC endpoint."""
    model: str

    def __post_init__(self) -> None:
        addresses.check_endpoint(self.address)


def problems(
    kind: str, models: Mapping[str, TritonModel], instances: Collection[str]
) -> Iterator[str]:
    """Yield what does not fit between ``engine.models`` and the instances."""
    if models and kind != KIND:
        yield f"engine.models is of kind {KIND}; this deployment's is {kind}"
    for name in models:
        if name not in instances:
            yield f"engine.models: there is no instance {name}; there are: {', '.join(instances)}"
    for name in instances:
        if kind == KIND and name not in models:
            yield f"engine.models: no model for {name}"
