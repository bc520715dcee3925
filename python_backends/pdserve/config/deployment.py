"""The types of ``deployment.yaml``: what is served, by which instances, on which servers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from pdserve.config import addresses
from pdserve.config.backend_models import TritonModel
from pdserve.config.control import MARGIN_S, QUIET_S, Control
from pdserve.config.llm_options import LlmArguments, LlmOptions
from pdserve.config.names import ROLES, Role

Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=1e7)]
TransportName = Literal["cuda_ipc", "shm", "nixl"]
LEASE_S = 30.0
EXTERNAL_LEASE_S = 60.0
"""Default of TensorRT-LLM's ``kv_transfer_timeout_ms``. The time runs while a request waits in the
queue of the other engine, too (NVIDIA/TensorRT-LLM#16872)."""
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """One ``tritonserver`` process and the models in it."""

    name: Name
    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002
    gateway: bool = True
    """True if it has the models pdserve, scheduler, tokenizer and detokenizer."""
    client_shared_memory: Literal["off", "key"] = "off"
    """``key``: clients that send a key may have the server read and write shared memory of this
    host. The server opens it as its own user: anyone with the key can read all shared memory of
    that user, KV caches included."""
    prefill: tuple[Name, ...] = ()
    decode: tuple[Name, ...] = ()
    flexible: tuple[Name, ...] = ()
    """The instances of it that may change roles while they run; the list in which one stands
    is its first role. The others keep their role."""

    def __post_init__(self) -> None:
        addresses.resolved(self.host)

    @property
    def ports(self) -> tuple[int, int, int]:
        """Return the HTTP, gRPC and metrics ports."""
        return self.http_port, self.grpc_port, self.metrics_port


class Engine(Struct, frozen=True, forbid_unknown_fields=True):
    """How an instance computes."""

    kind: Literal["torch", "emulated", "tensorrt_llm", "tensorrtllm_backend"] = "torch"
    """``tensorrt_llm``: its LLM API, in the instance's own process. ``tensorrtllm_backend``,
    legacy (images up to 26.07): a model of the C++ backend in another Triton server."""
    device: Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)\Z")] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of one instance; 0 means every core."""
    load_s: Seconds = 300.0
    """Seconds after which models that are not ready have failed to load."""
    profile: str | None = None
    """Timing profile of the emulated engine (YAML)."""
    gpus: dict[Name, tuple[Annotated[int, Meta(ge=0)], ...]] = {}
    """For ``tensorrt_llm``: the GPUs of an instance, one for each of its ranks; if not given, those
    that its server sees."""
    tensorrt_llm: LlmOptions = LlmOptions()
    models: dict[Name, TritonModel] = {}
    """For ``tensorrtllm_backend``, legacy: the model that computes for each instance."""

    @property
    def external(self) -> bool:
        """Tell whether the engine transfers KV caches itself."""
        return self.kind not in ("torch", "emulated")

    @property
    def gpu(self) -> int | None:
        """Return the number of the CUDA device that computes; None: the CPU does."""
        if self.kind != "torch" or self.device == "cpu":
            return None
        return int(self.device.partition(":")[2] or 0)


class Prefill(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one prefill instance."""

    slots: Count = 8
    """Requests held at once, each from acceptance until its KV cache has been transferred."""
    batch: Count = 4
    """Maximum number of requests without a first token, which share a forward. With twice as many
    slots, the next batch is computed while the last is transferred."""
    batch_tokens: Count = 512
    """Prompts share a forward while their uncached tokens stay below this."""
    arena_mib: Count = 512
    lease_s: Seconds | None = None
    """Seconds for which a KV cache waits for its decode. None: 30, or 60 if the engine moves KV
    caches itself."""
    tensor_parallel: Count = 1
    """Ranks that share the KV heads; each keeps its heads in a separate range."""

    @property
    def kept_s(self) -> float:
        """Return ``lease_s``, or the default of the project's own engines."""
        return LEASE_S if self.lease_s is None else self.lease_s


class Decode(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one decode instance."""

    slots: Count = 64
    blocks: Count = 1024
    block_size: Count = 16
    """Tokens in a block."""
    response_cost_ms: Annotated[float, Meta(ge=0)] = 0.6
    """Milliseconds by which the interval between two responses of a stream grows with each open
    stream."""
    max_interval_ms: Annotated[float, Meta(ge=0)] = 80.0
    tensor_parallel: Count = 1
    """Ranks that share the KV heads: a multiple or a divisor of the prefill's."""


class Network(Struct, frozen=True, forbid_unknown_fields=True):
    """The network between hosts, for UCX and for TensorRT-LLM; what is not given they detect."""

    devices: tuple[Annotated[str, Meta(pattern=r"^[\w.:/-]+\Z")], ...] = ()
    """Devices such as ``mlx5_0:1``, an RDMA device and its port, or the name of an interface."""
    gid_index: Annotated[int, Meta(ge=0, le=255)] | None = None
    """Index of RoCE v2 in the port's GID table."""
    traffic_class: Annotated[int, Meta(ge=0, le=255)] | None = None
    rails: Count | None = None
    """Maximum number of devices that share one transfer."""
    interface: Annotated[str, Meta(pattern=r"^[\w.-]{1,15}\Z")] | None = None
    """Interface for the connections by which TensorRT-LLM's engines find each other."""


class Transfer(Struct, frozen=True, forbid_unknown_fields=True):
    """How KV caches are transferred."""

    transports: tuple[TransportName, ...] | None = None
    """Transports, the best first. None: ``cuda_ipc`` if the engine is on a GPU, ``shm``, and
    ``nixl`` if there is more than one host."""
    require: Literal["any", "rdma"] = "any"
    """``rdma``: a pair of instances without RDMA between them is refused."""
    strategy: Literal["auto", "whole", "direct", "layered"] = "auto"
    """``auto``: chosen by the measured times of each link."""
    key_file: str = "kv.key"
    """File with the key under which handles are sealed; made if it does not exist."""
    pulls: Count = 4
    """Number of pulls at the same time in one decode."""
    staging_mib: Count = 16
    """Size of the staging buffers of one decode, for transports that do not map the prefill's
    memory."""
    timeout_s: Seconds = 30.0
    """Seconds of one pull, the wait for layers that are still being computed included."""
    network: Network = Network()


class Gateway(Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are admitted and forwarded."""

    channel: Literal["grpc", "bls"] = "grpc"
    ttft_limit_ms: Count = 60_000
    max_prompt_tokens: Count | None = None
    """None: the model's context length."""
    max_prompt_bytes: Count = 1 << 20
    max_stop_words: Count = 16
    stall_s: Seconds = 30.0
    """Seconds of silence after which an instance has failed."""
    local: Literal["off", "on", "auto"] = "off"
    """Which prompts a decode computes itself. ``auto``: those of which it has all but
    ``local_tokens`` cached, and any while all prefills are busy and a decode has no request."""
    local_tokens: Annotated[int, Meta(ge=0)] = 32
    default_scenario: Name = "default"
    """Scenario of requests that carry no label and match no rule."""
    strict: bool = False
    """True: a label that no scenario has is refused; False: it means the default scenario."""
    traces: Annotated[str, Meta(pattern="^https?://.")] | None = None
    """Full URL of an OTLP/HTTP collector, such as ``http://127.0.0.1:4318/v1/traces``."""


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """Matches requests that carry no label and meet all conditions that are given here."""

    prefix: str | None = None
    """Prefix of the prompt's text; for a conversation, of its first turn. It never matches token
    ids."""
    tenant: str | None = None
    model: Literal["pdserve", "scheduler", "ensemble"] | None = None
    """The Triton model that was called."""

    def __post_init__(self) -> None:
        if self.prefix is None and self.tenant is None and self.model is None:
            raise ValueError("a rule gives at least one of prefix, tenant and model")


class SamplingDefaults(Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters of requests that give none.

    Bounds and defaults are those of a request.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0


class Group(Struct, frozen=True, forbid_unknown_fields=True):
    """Prefills and decodes that serve one scenario and nothing else."""

    name: Name
    prefill: Annotated[tuple[Name, ...], Meta(min_length=1)]
    decode: Annotated[tuple[Name, ...], Meta(min_length=1)]
    share: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of its share of the scenario's requests, relative to those of the other groups."""


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of traffic, with its own groups."""

    name: Name
    groups: Annotated[tuple[Group, ...], Meta(min_length=1)]
    rules: tuple[Rule, ...] = ()
    ttft_limit_ms: Count | None = None
    """None: the gateway's limit."""
    tpot_limit_ms: Annotated[float, Meta(gt=0)] | None = None
    """Milliseconds per token above which a request counts as having missed its limits."""
    max_tokens: Count | None = None
    """Default of requests that give none, as far as there is room; None: 128."""
    sampling: SamplingDefaults = SamplingDefaults()
    priority: int = 0
    """Default of requests that give none."""
    shared_prefixes: bool = False
    """True if tenants may reuse each other's cached prefixes."""


class Deployment(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    model: str
    servers: Annotated[tuple[Server, ...], Meta(min_length=1)]
    engine: Engine = Engine()
    prefill: Prefill = Prefill()
    decode: Decode = Decode()
    gateway: Gateway = Gateway()
    transfer: Transfer = Transfer()
    scenarios: tuple[Scenario, ...] = ()
    """If empty, there is one scenario, the default, whose one group has every instance that is no
    spare."""
    control: Control | None = None
    """None: the deployment is static."""

    def __post_init__(self) -> None:
        if self.engine.external and self.prefill.lease_s is None:
            prefill = msgspec.structs.replace(self.prefill, lease_s=EXTERNAL_LEASE_S)
            msgspec.structs.force_setattr(self, "prefill", prefill)

    @property
    def served(self) -> tuple[Scenario, ...]:
        """Return the scenarios, the implicit one included."""
        if self.scenarios:
            return self.scenarios
        spares = self.control.spares if self.control else ()
        prefills, decodes = (
            tuple(name for name in self.instances(role) if name not in spares) for role in ROLES
        )
        everyone = Group("default", prefills, decodes)
        return (Scenario(self.gateway.default_scenario, (everyone,)),)

    @property
    def transports(self) -> tuple[TransportName, ...]:
        """Return the transports that instances use, the best first."""
        if self.transfer.transports is not None:
            return self.transfer.transports
        gpu: tuple[TransportName, ...] = ("cuda_ipc",) if self.engine.gpu is not None else ()
        far: tuple[TransportName, ...] = (
            ("nixl",) if len({addresses.machine(s.host) for s in self.servers}) > 1 else ()
        )
        return (*gpu, "shm", *far)

    @property
    def count(self) -> int:
        """Return the number of instances of both roles."""
        return sum(len(self.instances(role)) for role in ROLES)

    @property
    def least_drain_s(self) -> float:
        """Return the time for which an instance that leaves may still hold a KV cache."""
        return self.prefill.kept_s + QUIET_S

    @property
    def drain_s(self) -> float:
        """Return ``control.drain_s``, or its default."""
        given = self.control.drain_s if self.control else None
        return self.least_drain_s + MARGIN_S if given is None else given

    def ranks(self, role: Role) -> int:
        """Return the number of GPUs of one TensorRT-LLM instance."""
        arguments: LlmArguments = getattr(self.engine.tensorrt_llm, role)
        tensor_parallel: int = getattr(self, role).tensor_parallel
        return tensor_parallel * arguments.pipeline_parallel_size * arguments.context_parallel_size

    @property
    def flexible(self) -> frozenset[str]:
        """Return the instances that may change roles while they run."""
        return frozenset(name for server in self.servers for name in server.flexible)

    def instances(self, role: Role) -> dict[str, Server]:
        """Return every instance of a role, with its server."""
        return {name: server for server in self.servers for name in getattr(server, role)}


FORMER_KEYS = {
    "gateway.policy": (
        "this key was removed: a gateway forwards on demand; the policies that this is compared "
        "with are in perf/baselines, and perf.scheduling chooses among them"
    ),
    "gateway.report_ms": (
        "this key was removed: it belonged to policies that are in perf/baselines now"
    ),
}
"""Keys of earlier versions, with the explanation for the error on each."""
