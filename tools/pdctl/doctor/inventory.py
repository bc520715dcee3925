"""What there is on a host, as plain data that JSON carries."""

from __future__ import annotations

from msgspec import Struct


class Software(Struct, frozen=True, kw_only=True):
    """Versions as they call themselves; empty: not there."""

    python: str
    glibc: str
    triton: str
    packages: dict[str, str]
    """Those of `versions.PACKAGES` that are installed."""
    torch_cuda: str
    """Of the CUDA that torch is built for."""


class System(Struct, frozen=True, kw_only=True):
    """Kernel and memory."""

    machine: str = ""
    """As `uname -m`."""
    kernel: str = ""
    memory_mib: int = 0
    """What this container may have, where there is such a limit."""
    available_mib: int = 0
    shm_mib: int = 0
    """Size of /dev/shm; 0: there is none."""
    shm_free_mib: int = 0


class Process(Struct, frozen=True, kw_only=True):
    """What a process started here may do."""

    nofile: int | None = None
    """The hard limit of open files, which servers raise theirs to; None: there is none."""
    memlock_kib: int | None = None
    """The soft limit; None: there is none."""
    capabilities: tuple[str, ...] = ()
    """Of those that matter here: IPC_LOCK, SYS_PTRACE."""
    seccomp: bool = False
    ptrace_scope: int = 0
    """Of Yama; 0 where the kernel is without it."""
    container: str = ""
    """docker, podman, kubernetes; empty: in none, as far as can be seen."""
    private: tuple[str, ...] = ()
    """Namespaces that are not the machine's own: ipc, pid."""
    environment: dict[str, str] = {}
    """Variables that change what CUDA, torch and UCX do."""


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
    """Two GPUs: the path between them (NV18, PIX, PHB, ...), and whether one reads the other."""

    first: int
    second: int
    path: str
    peer: str
    """OK, or nvidia-smi's word for why not."""


class GPUNic(Struct, frozen=True, kw_only=True):
    """The path between a GPU and an RDMA device."""

    gpu: int
    device: str
    path: str


class Topology(Struct, frozen=True, kw_only=True):
    """How GPUs are connected."""

    pairs: tuple[GPUPair, ...] = ()
    nics: tuple[GPUNic, ...] = ()


class Direct(Struct, frozen=True, kw_only=True):
    """What lets an RDMA device reach the memory of GPUs."""

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
    """The one that nixl brings."""

    version: str
    transports: tuple[str, ...]
    """As tcp/eth0, cma/memory, rc_mlx5/mlx5_0:1."""


class Port(Struct, frozen=True, kw_only=True):
    """One that a server of the deployment wants."""

    use: str
    """http, grpc, metrics."""
    number: int
    holder: str
    """Who has it, in words; empty: nobody."""


class Server(Struct, frozen=True, kw_only=True):
    """One of the deployment, as far as this host knows of it."""

    name: str
    here: bool
    pid: int | None
    """Of its process; None: it does not run here."""
    ports: tuple[Port, ...]
    """Of a server of this host that does not run."""


class Inventory(Struct, frozen=True, kw_only=True):
    """All of it."""

    software: Software
    system: System
    process: Process
    gpus: tuple[GPU, ...]
    topology: Topology
    direct: Direct
    rdma: tuple[RDMAPort, ...]
    ucx: UCX | None
    """None: no nixl."""
    cma: str
    """What process_vm_readv between two processes says; empty: it works."""
    checkout: str
    """Why nothing can be served from where this lies; empty: it can."""
    model: str
    """Why the deployment's model, or what the engine reads beside it, cannot be used; empty: it
    can."""
    servers: tuple[Server, ...]
    unknown: dict[str, str]
    """What could not be found out, and why; its fields are as if there were nothing."""
