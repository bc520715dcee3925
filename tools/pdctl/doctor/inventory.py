"""The inventory of a host, as plain data for JSON."""

from __future__ import annotations

from msgspec import Struct


class Software(Struct, frozen=True, kw_only=True):
    """Versions as the software states them; empty: not installed."""

    python: str
    glibc: str
    triton: str
    packages: dict[str, str]
    """Installed packages among `versions.PACKAGES`."""
    torch_cuda: str
    """The CUDA version that torch is built for."""
    embedded: bool = False
    """Triton is the one that nvidia-pytriton carries."""
    tensorrt_llm: str = ""
    """Why the engine cannot use the installed tensorrt_llm; empty: it can, or was not tried."""


class System(Struct, frozen=True, kw_only=True):
    """Kernel and memory."""

    machine: str = ""
    """The machine, as `uname -m` prints it."""
    kernel: str = ""
    memory_mib: int = 0
    """The limit of this container, if there is one."""
    available_mib: int = 0
    shm_mib: int = 0
    """Size of /dev/shm; 0: there is none."""
    shm_free_mib: int = 0


class Process(Struct, frozen=True, kw_only=True):
    """Abilities of a process that is started here."""

    nofile: int | None = None
    """The hard limit of open files, to which servers raise theirs; None: there is none."""
    memlock_kib: int | None = None
    """The soft limit; None: there is none."""
    capabilities: tuple[str, ...] = ()
    """Capabilities that matter here: IPC_LOCK, SYS_PTRACE."""
    seccomp: bool = False
    ptrace_scope: int = 0
    """Yama's setting; 0 if the kernel has no Yama."""
    container: str = ""
    """docker, podman or kubernetes; empty: no container is recognized."""
    private: tuple[str, ...] = ()
    """Namespaces that differ from the machine's own: ipc, pid."""
    environment: dict[str, str] = {}
    """Those of ``variables.VARIABLES`` that are set."""


class GPU(Struct, frozen=True, kw_only=True):
    """A GPU as nvidia-smi describes it."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int
    compute_mode: str
    mig: bool


class GPUPair(Struct, frozen=True, kw_only=True):
    """Two GPUs: the path between them (NV18, PIX, PHB, ...), and whether one can read the other."""

    first: int
    second: int
    path: str
    peer: str
    """OK, or nvidia-smi's code for the reason why not."""


class GPUNic(Struct, frozen=True, kw_only=True):
    """The path between a GPU and an RDMA device."""

    gpu: int
    device: str
    path: str


class Topology(Struct, frozen=True, kw_only=True):
    """The connections of GPUs."""

    pairs: tuple[GPUPair, ...] = ()
    nics: tuple[GPUNic, ...] = ()


class Direct(Struct, frozen=True, kw_only=True):
    """Kernel modules by which an RDMA device reaches the memory of GPUs."""

    peermem: bool = False
    """nvidia_peermem is loaded."""
    open_module: bool = False
    """The driver's kernel module is the open one, which exports memory as dma-buf."""


class Gid(Struct, frozen=True, kw_only=True):
    """A row of a port's GID table."""

    index: int
    gid: str
    kind: str
    """IB/RoCE v1, RoCE v2."""
    netdev: str


class RDMAPort(Struct, frozen=True, kw_only=True):
    """A port of an RDMA device."""

    device: str
    port: int
    state: str
    """ACTIVE, DOWN, INIT, ..."""
    link_layer: str
    """InfiniBand, Ethernet."""
    rate: str
    gids: tuple[Gid, ...]
    accessible: bool
    """This user may open the device."""


class UCX(Struct, frozen=True, kw_only=True):
    """The UCX of the installed nixl."""

    version: str
    transports: tuple[str, ...]
    """Transports such as tcp/eth0, cma/memory, rc_mlx5/mlx5_0:1."""


class Port(Struct, frozen=True, kw_only=True):
    """A port that a server of the deployment needs."""

    use: str
    """http, grpc or metrics."""
    number: int
    holder: str
    """The process that has it, in words; empty: none."""


class Server(Struct, frozen=True, kw_only=True):
    """A server of the deployment, as far as this host knows it."""

    name: str
    here: bool
    pid: int | None
    """The id of its process; None: it does not run here."""
    ports: tuple[Port, ...]
    """The ports of a server of this host that does not run."""


class Inventory(Struct, frozen=True, kw_only=True):
    """Everything that was found."""

    software: Software
    system: System
    process: Process
    gpus: tuple[GPU, ...]
    topology: Topology
    direct: Direct
    rdma: tuple[RDMAPort, ...]
    ucx: UCX | None
    """None: nixl is not installed."""
    cma: str
    """The error of process_vm_readv between two processes; empty: it works."""
    checkout: str
    """Why nothing can be served from this folder; empty: it can."""
    model: str
    """Why the deployment's model, or what the engine reads beside it, cannot be used; empty: it
    can."""
    servers: tuple[Server, ...]
    unknown: dict[str, str]
    """Reasons why something could not be found out; its fields have their defaults."""
