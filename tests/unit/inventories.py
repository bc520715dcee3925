"""Four hosts, as a probe would find them, and how to change one of them."""

from __future__ import annotations

from typing import Any

import msgspec

from pdctl.doctor.inventory import (
    GPU,
    UCX,
    Direct,
    Gid,
    GPUNic,
    GPUPair,
    Inventory,
    Port,
    Process,
    RDMAPort,
    Server,
    Software,
    System,
    Topology,
)

PACKAGES = {
    "numpy": "1.26.4",
    "tritonclient": "2.73.0",
    "torch": "2.13.0",
    "nixl-cu12": "1.5.1",
    "cuda-bindings": "12.9.4",
    "tensorrt_llm": "1.3.0rc25",
}


def without(packages: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in packages.items() if name not in names}


def differing(inventory: Inventory, **sections: Any) -> Inventory:
    """Replace fields of sections by those of dicts, and anything else by the given value."""
    return msgspec.structs.replace(
        inventory,
        **{
            name: msgspec.structs.replace(getattr(inventory, name), **fields)
            if isinstance(fields, dict) and name != "unknown"
            else fields
            for name, fields in sections.items()
        },
    )


def gpu(index: int, **fields: Any) -> GPU:
    known = {
        "uuid": f"GPU-3fd3e3b7-0000-0000-0000-{index:012}",
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "570.124.06",
        "memory_mib": 81559,
        "compute_mode": "Default",
        "mig": False,
    }
    return GPU(index=index, **(known | fields))


def roce(device: str, netdev: str, **fields: Any) -> RDMAPort:
    link, address = (
        "fe80:0000:0000:0000:0ac0:ebff:fe00:0001",
        "0000:0000:0000:0000:0000:ffff:0a00:0001",
    )
    rows = [(link, "IB/RoCE v1"), (link, "RoCE v2"), (address, "IB/RoCE v1"), (address, "RoCE v2")]
    known = {
        "port": 1,
        "state": "ACTIVE",
        "link_layer": "Ethernet",
        "rate": "400 Gb/sec (4X NDR)",
        "gids": tuple(
            Gid(index=index, gid=gid, kind=kind, netdev=netdev)
            for index, (gid, kind) in enumerate(rows)
        ),
        "accessible": True,
    }
    return RDMAPort(device=device, **(known | fields))


def server(name: str, *, here: bool = True, pid: int | None = None, holder: str = "") -> Server:
    ports = tuple(
        Port(use=use, number=number, holder=holder if use == "grpc" else "")
        for use, number in (("http", 8000), ("grpc", 8001), ("metrics", 8002))
    )
    return Server(name=name, here=here, pid=pid, ports=ports if here and pid is None else ())


LAPTOP = Inventory(
    software=Software(
        python="3.11.7",
        glibc="2.36",
        triton="2.51.0",
        packages=without(PACKAGES, "cuda-bindings", "tensorrt_llm") | {"torch": "2.13.0+cpu"},
        torch_cuda="",
        embedded=True,
    ),
    system=System(
        machine="x86_64",
        kernel="6.1.0-28-amd64",
        memory_mib=15_800,
        available_mib=11_200,
        shm_mib=7_900,
        shm_free_mib=7_850,
    ),
    process=Process(nofile=1_048_576, memlock_kib=8192, ptrace_scope=1),
    gpus=(),
    topology=Topology(),
    direct=Direct(),
    rdma=(),
    ucx=UCX(version="1.23.0", transports=("self/memory", "tcp/wlp2s0", "tcp/lo", "cma/memory")),
    cma="",
    checkout="",
    model="",
    servers=(server("local"),),
    unknown={},
)
ONE_GPU = differing(
    LAPTOP,
    software={"packages": without(PACKAGES, "tensorrt_llm"), "torch_cuda": "12.8"},
    system={"kernel": "6.8.0-51-generic", "shm_mib": 64_000, "shm_free_mib": 64_000},
    gpus=(gpu(0),),
    ucx=UCX(
        version="1.23.0", transports=("tcp/eth0", "cma/memory", "cuda_copy/cuda", "cuda_ipc/cuda")
    ),
)
TWO_GPUS = differing(
    ONE_GPU,
    software={"packages": PACKAGES},
    process={"environment": {"TRTLLM_NO_USAGE_STATS": "1"}},
    gpus=(gpu(0), gpu(1)),
    topology=Topology(pairs=(GPUPair(first=0, second=1, path="NV18", peer="OK"),)),
)
ROCE = differing(
    TWO_GPUS,
    process={"memlock_kib": None},
    topology={
        "nics": tuple(
            GPUNic(gpu=gpu, device=device, path=path)
            for gpu, device, path in (
                *((0, "mlx5_0", "PIX"), (0, "mlx5_1", "SYS")),
                *((1, "mlx5_0", "SYS"), (1, "mlx5_1", "PXB")),
            )
        )
    },
    direct=Direct(peermem=True),
    rdma=(roce("mlx5_0", "ens1f0np0"), roce("mlx5_1", "ens2f0np0")),
    ucx=UCX(
        version="1.23.0",
        transports=(
            "tcp/eno1",
            "cma/memory",
            "rc_mlx5/mlx5_0:1",
            "rc_mlx5/mlx5_1:1",
            "cuda_ipc/cuda",
        ),
    ),
    servers=(server("a"), server("b", here=False)),
)
HOSTS = {"laptop": LAPTOP, "one GPU": ONE_GPU, "two GPUs": TWO_GPUS, "RoCE": ROCE}
