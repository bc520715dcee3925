"""``deployment.yaml`` as types: what is served, by which instances, on which servers.

A file is decoded and checked in one go; an error names the field, its value's
type and what is allowed. Paths in the file are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from pdserve.errors import DeploymentError

Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = get_args(Role)
TransportName = Literal["cuda_ipc", "shm", "nixl"]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """One ``tritonserver`` process and the models in it."""

    name: Name
    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    gateway: bool = True
    """Holds pdserve, scheduler, tokenizer and detokenizer."""
    prefill: tuple[Name, ...] = ()
    decode: tuple[Name, ...] = ()

    @property
    def ports(self) -> tuple[int, int, int]:
        """HTTP, gRPC, metrics."""
        return self.http_port, self.grpc_port, self.metrics_port


class Engine(Struct, frozen=True, forbid_unknown_fields=True):
    """How an instance computes."""

    kind: Literal["torch", "emulated"] = "torch"
    device: Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of one instance; 0 means every core."""
    profile: str | None = None
    """Timing profile of the emulated engine (YAML)."""

    @property
    def gpu(self) -> int | None:
        """Number of the CUDA device that computes; None: the CPU does."""
        if self.kind == "emulated" or self.device == "cpu":
            return None
        return int(self.device.partition(":")[2] or 0)


class Prefill(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one prefill instance."""

    slots: Count = 4
    """Requests held at once, each from acceptance until its KV cache has been transferred."""
    batch_tokens: Count = 512
    """Prompts share a forward while their uncached tokens stay below this."""
    arena_mib: Count = 512
    lease_s: Seconds = 30.0
    """How long a KV cache waits for its decode."""
    tensor_parallel: Count = 1
    """Ranks that share out the KV heads; each keeps its own in a range of its own."""


class Decode(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one decode instance."""

    slots: Count = 64
    blocks: Count = 1024
    block_size: Count = 16
    """Tokens in a block."""
    response_cost_ms: Annotated[float, Meta(ge=0)] = 0.6
    """The interval between two responses of a stream grows by this with each open stream."""
    max_interval_ms: Annotated[float, Meta(ge=0)] = 80.0
    tensor_parallel: Count = 1
    """Ranks that share out the KV heads: a multiple or a divisor of the prefill's."""


class Transfer(Struct, frozen=True, forbid_unknown_fields=True):
    """How KV caches move."""

    transports: tuple[TransportName, ...] | None = None
    """Best first. None: ``cuda_ipc`` where the engine is on a GPU, ``shm``, and ``nixl`` where
    there is more than one host."""
    require: Literal["any", "rdma"] = "any"
    """``rdma``: a pair of instances that has no RDMA between them is refused."""
    strategy: Literal["auto", "whole", "direct", "layered"] = "auto"
    """``auto``: by what each link has been seen to take."""
    key_file: str = "kv.key"
    """Holds the secret that handles are sealed with; made where it does not exist."""
    pulls: Count = 4
    """At once, in one decode."""
    staging_mib: Count = 16
    """Arrival space of one decode, for transports that do not map the prefill's memory."""
    timeout_s: Seconds = 30.0
    """Of one pull, the wait for layers that are still being computed included."""


class Gateway(Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are admitted and forwarded."""

    channel: Literal["grpc", "bls"] = "grpc"
    ttft_limit_ms: Count = 60_000
    max_prompt_tokens: Count | None = None
    """None: the model's context length."""
    max_prompt_bytes: Count = 1 << 20
    max_stop_words: Count = 16
    stall_s: Seconds = 30.0
    """An instance that says nothing for so long has failed."""


class Deployment(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    model: str
    servers: Annotated[tuple[Server, ...], Meta(min_length=1)]
    engine: Engine = Engine()
    prefill: Prefill = Prefill()
    decode: Decode = Decode()
    gateway: Gateway = Gateway()
    transfer: Transfer = Transfer()

    @property
    def transports(self) -> tuple[TransportName, ...]:
        """Those that instances are to use, best first."""
        if self.transfer.transports is not None:
            return self.transfer.transports
        gpu: tuple[TransportName, ...] = ("cuda_ipc",) if self.engine.gpu is not None else ()
        far: tuple[TransportName, ...] = (
            ("nixl",) if len({s.host for s in self.servers}) > 1 else ()
        )
        return (*gpu, "shm", *far)

    def instances(self, role: Role) -> dict[str, Server]:
        """Every instance of a role, with the server that holds it."""
        return {name: server for server in self.servers for name in getattr(server, role)}


def load(path: Path) -> Deployment:
    """Read and check a deployment; its paths come back absolute.

    Raises:
        DeploymentError: unreadable, not YAML, or a field is wrong; the message names it.
    """
    try:
        deployment = msgspec.yaml.decode(path.read_bytes(), type=Deployment)
    except OSError as error:
        raise DeploymentError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise DeploymentError(f"{path}: {error}") from error
    servers = deployment.servers
    for what, values in (
        ("server", [server.name for server in servers]),
        ("instance", [name for server in servers for name in (*server.prefill, *server.decode)]),
        ("address", [f"{s.host}:{port}" for s in servers for port in s.ports]),
    ):
        for value in values:
            if values.count(value) > 1:
                raise DeploymentError(f"{path}: {what} {value} is used more than once")
    for role in ROLES:
        if not deployment.instances(role):
            raise DeploymentError(f"{path}: no server has a {role} instance; at least 1 is needed")

    def absolute(value: str) -> str:
        return str((path.parent / Path(value).expanduser()).resolve())

    engine = deployment.engine
    if engine.profile is not None:
        engine = msgspec.structs.replace(engine, profile=absolute(engine.profile))
    transfer = deployment.transfer
    transfer = msgspec.structs.replace(transfer, key_file=absolute(transfer.key_file))
    return msgspec.structs.replace(
        deployment, model=absolute(deployment.model), engine=engine, transfer=transfer
    )
