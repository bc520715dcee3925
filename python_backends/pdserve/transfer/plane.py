"""The transfer plane that a deployment configures: a prefill's holder, a decode's receiver."""
# ruff: noqa: PLC0415 - what a deployment does not use is not imported

from __future__ import annotations

from pdserve.config import Deployment
from pdserve.errors import DeploymentError
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import sharding_for
from pdserve.transfer import arrays, key
from pdserve.transfer.arrays import Array
from pdserve.transfer.consumer.cost_model import Strategy
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Terms
from pdserve.transfer.producer.holder import Holder, region_name
from pdserve.transfer.protocol import Transport, Unreachable
from pdserve.transfer.transports.shm import ShmTransport

PIECE = 4 << 20
"""Bytes of a staging buffer."""


def terms(deployment: Deployment, fingerprint: str, layout: KVLayout) -> Terms:
    """Return a deployment's terms.

    Raises DeploymentError without a key, or if prefill and decode do not fit.
    """
    ranks = deployment.prefill.tensor_parallel, deployment.decode.tensor_parallel
    secret = key.of(deployment)
    return Terms(fingerprint, layout, secret, sharding_for(*ranks, layout.kv_heads))


def transports(deployment: Deployment) -> list[Transport]:
    """Return a deployment's transports, the best first."""
    made: list[Transport] = []
    for name in deployment.transports:
        if name == "shm":
            made.append(ShmTransport())
        elif name == "nixl":
            from pdserve.transfer.transports.nixl.transport import NixlTransport

            made.append(NixlTransport())
        else:
            from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport

            made.append(CudaIpcTransport(deployment.engine.gpu or 0))
    return made


def holder(deployment: Deployment, name: str, terms: Terms, slots: int) -> Holder:
    """Make the holder of a prefill's arena, in which its engine computes.

    Raises:
        DeploymentError: there is not enough memory, or no transport can export it.
    """
    data_bytes = deployment.prefill.arena_mib << 20
    data, free = None, _nothing
    if deployment.engine.gpu is not None:
        from pdserve.transfer.transports.cuda_ipc.calls import load
        from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory

        try:
            memory = DeviceMemory(load(), data_bytes, deployment.engine.gpu)
            data, free = arrays.seen(memory.memory), memory.free
        except Unreachable as error:
            raise DeploymentError(f"prefill.arena_mib {data_bytes >> 20}: {error}") from error
    ways = transports(deployment)
    return Holder(name, region_name(name), data_bytes, slots, terms, ways, data, free)


def _nothing() -> None:
    """Host memory is freed with its last array."""


def receiver(deployment: Deployment, terms: Terms, pool: Array) -> Receiver:
    """Make the receiver for a decode's pool, uint8 [planes, rows, row_bytes]."""
    wanted = deployment.transfer
    strategy: Strategy | None = None
    if wanted.strategy == "whole" or wanted.strategy == "direct":
        strategy = wanted.strategy
    staging = arrays.like(pool, (max((wanted.staging_mib << 20) // PIECE, 2), PIECE))
    return Receiver(
        terms,
        transports(deployment),
        pool,
        Staging(staging),
        ranks=deployment.decode.tensor_parallel,
        rdma_only=wanted.require == "rdma",
        strategy=strategy,
        timeout_s=wanted.timeout_s,
    )
