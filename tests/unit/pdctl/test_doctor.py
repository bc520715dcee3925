"""Tests for the findings of `pdctl doctor` about four hosts, and about one fault on each."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from pdctl.doctor.advice.advice import advice, conclusion, hindrances
from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.inventory import UCX, Direct, GPUPair, Inventory, Topology
from pdctl.doctor.report import report
from pdctl.doctor.versions import PACKAGES as NAMES
from pdctl.doctor.versions import READ, SUPPORTED
from pdctl.paths import ROOT
from pdserve.config import Deployment, Engine, Gateway, Network, Prefill, Server
from pdserve.config.llm_options import CacheTransceiverConfig, LlmOptions
from pdserve.engines.tensorrt_llm import api
from tests.unit.inventories import (
    HOSTS,
    LAPTOP,
    ONE_GPU,
    PACKAGES,
    ROCE,
    TWO_GPUS,
    differing,
    gpu,
    roce,
    server,
    without,
)

CPU = Deployment(
    model="/models/m",
    servers=(Server("local", prefill=("p0", "p1"), decode=("d0", "d1")),),
)
GPU = msgspec.structs.replace(CPU, engine=Engine(device="cuda:0"))
TENSORRT = Deployment(
    model="/models/m",
    servers=(Server("local", prefill=("p0",), decode=("d0",)),),
    engine=Engine(kind="tensorrt_llm", gpus={"p0": (0,), "d0": (1,)}),
)
PAIR = Deployment(
    model="/models/m",
    servers=(
        Server("a", host="10.0.0.1", prefill=("p0",)),
        Server("b", host="10.0.0.2", gateway=False, decode=("d0",)),
    ),
    engine=Engine(device="cuda:0"),
)


def with_transfer(deployment: Deployment, **fields: Any) -> Deployment:
    transfer = msgspec.structs.replace(deployment.transfer, **fields)
    return msgspec.structs.replace(deployment, transfer=transfer)


RDMA_ONLY = with_transfer(PAIR, require="rdma")


def states(inventory: Inventory, deployment: Deployment) -> dict[str, str]:
    """Return the findings that are not in order, with their state."""
    found = advice(inventory, deployment)
    return {finding.about: finding.state for finding in found if finding.state != "ok"}


def one(inventory: Inventory, deployment: Deployment, about: str) -> Finding:
    [found] = [found for found in advice(inventory, deployment) if found.about == about]
    return found


def problems(inventory: Inventory, deployment: Deployment) -> dict[str, Finding]:
    """Return the problems that keep the deployment from being served; the conclusion must agree."""
    found = advice(inventory, deployment)
    kept = {finding.about: finding for finding in found if finding.state == "problem"}
    assert conclusion(inventory, deployment, found).served == (not kept)
    return kept


class TestHosts:
    """On hosts in order, the report says what is used and what is not, and nothing hinders."""

    def test_a_laptop_serves_the_default_deployment_over_shared_memory(self) -> None:
        assert states(LAPTOP, CPU) == {
            **dict.fromkeys(("cuda-bindings", "tensorrt_llm", "GPUs", "RDMA"), "missing"),
        }
        assert one(LAPTOP, CPU, "KV caches here").found == "shm"
        assert "2 x" not in one(LAPTOP, CPU, "/dev/shm").found
        assert "1,032 needed" in one(LAPTOP, CPU, "/dev/shm").found
        ended = conclusion(LAPTOP, CPU, advice(LAPTOP, CPU))
        assert ended.served
        assert ended.engine == "torch on the CPU"
        assert [name for name, why in ended.engines.items() if not why] == [
            *("torch on the CPU", "emulated")
        ]
        assert ended.transports == {
            "cuda_ipc": "no GPU",
            "shm": "",
            "nixl over rdma": "no RDMA device",
            "nixl over cma": "",
            "nixl over tcp": "",
        }

    def test_one_gpu_takes_cuda_ipc_between_its_processes(self) -> None:
        assert states(ONE_GPU, GPU) == {"tensorrt_llm": "missing", "RDMA": "missing"}
        assert one(ONE_GPU, GPU, "KV caches here").found == "cuda_ipc"
        assert one(ONE_GPU, GPU, "GPUs").found == (
            "1 x NVIDIA H100 80GB HBM3, 80 GiB; driver 570.124.06"
        )
        assert one(ONE_GPU, GPU, "GPUs").used == "engine torch on GPU 0"
        # An arena on the device needs no memory in /dev/shm.
        assert "; 8 needed" in one(ONE_GPU, GPU, "/dev/shm").found
        ended = conclusion(ONE_GPU, GPU, advice(ONE_GPU, GPU))
        assert ended.engine == "torch on GPU 0"
        assert ended.engines["torch on a GPU"] == ""
        assert ended.transports["cuda_ipc"] == ""

    def test_a_gpu_that_the_deployment_leaves_alone(self) -> None:
        assert one(ONE_GPU, CPU, "GPUs").unused == "all: engine torch is on the CPU"
        assert one(ONE_GPU, CPU, "KV caches here").found == "shm"
        assert not problems(ONE_GPU, CPU)

    def test_two_gpus_with_nvlink_reach_each_other(self) -> None:
        assert states(TWO_GPUS, TENSORRT) == {"RDMA": "missing"}
        assert one(TWO_GPUS, TENSORRT, "peer access").found == "NV18 0-1"
        assert "itself" in one(TWO_GPUS, TENSORRT, "KV caches").found
        assert one(TWO_GPUS, TENSORRT, "GPUs").used == "engine tensorrt_llm on GPU 0, 1"

    def test_a_pair_of_hosts_takes_rdma_from_gpu_to_gpu(self) -> None:
        assert states(ROCE, RDMA_ONLY) == {}
        assert one(ROCE, RDMA_ONLY, "KV caches to hosts").found == "nixl over rdma"
        direct = one(ROCE, RDMA_ONLY, "GPUDirect RDMA").found
        assert direct == "nvidia_peermem; nearest: GPU 0 mlx5_0 PIX, GPU 1 mlx5_1 PXB"
        assert "RoCE v2 GID 3 (ens1f0np0)" in one(ROCE, RDMA_ONLY, "RDMA").found
        assert "on other hosts: b" in one(ROCE, RDMA_ONLY, "servers").found

    @pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
    def test_json_carries_an_inventory(self, host: Inventory) -> None:
        assert msgspec.json.decode(msgspec.json.encode(host), type=Inventory) == host


class TestGPUs:
    def test_none_for_an_engine_that_wants_one(self) -> None:
        found = problems(LAPTOP, GPU)
        assert set(found) == {"torch", "cuda-bindings", "GPUs", "KV caches here"}
        assert found["GPUs"].found == "a process sees 0; the deployment wants number 0"

    @pytest.mark.parametrize(
        ("visible", "served"), [("", False), ("-1", False), ("0,-1,1", False), ("1,0", True)]
    )
    def test_cuda_visible_devices_hides_them(self, visible: str, served: bool) -> None:
        environment = {"CUDA_VISIBLE_DEVICES": visible}
        host = differing(TWO_GPUS, process={"environment": environment})
        assert ("GPUs" not in problems(host, TENSORRT)) == served

    def test_more_are_wanted_than_there_are(self) -> None:
        engine = Engine(kind="tensorrt_llm", gpus={"p0": (0,), "d0": (2,)})
        deployment = msgspec.structs.replace(TENSORRT, engine=engine)
        assert "wants number 2" in problems(TWO_GPUS, deployment)["GPUs"].found

    def test_as_many_as_ranks_where_none_are_named(self) -> None:
        engine = Engine(kind="tensorrt_llm")
        deployment = msgspec.structs.replace(TENSORRT, engine=engine)
        assert not problems(TWO_GPUS, deployment)
        deployment = msgspec.structs.replace(deployment, prefill=Prefill(tensor_parallel=4))
        assert "wants number 3" in problems(TWO_GPUS, deployment)["GPUs"].found

    def test_models_of_another_triton_server_need_none_here(self) -> None:
        deployment = msgspec.structs.replace(TENSORRT, engine=Engine(kind="tensorrtllm_backend"))
        assert not problems(LAPTOP, deployment)

    @pytest.mark.parametrize(
        ("driver", "cuda", "bindings", "wanted"),
        [
            ("470.256.02", "12.8", "12.9.4", 525),
            ("550.90.07", "13.0", "12.9.4", 580),
            ("550.90.07", "12.8", "13.4.4", 580),
            ("525.60.13", "12.8", "12.9.4", None),
            ("580.65.06", "13.0", "13.4.4", None),
        ],
    )
    def test_driver_and_cuda(
        self, driver: str, cuda: str, bindings: str, wanted: int | None
    ) -> None:
        packages = ONE_GPU.software.packages | {"cuda-bindings": bindings}
        host = differing(
            ONE_GPU,
            gpus=(gpu(0, driver=driver),),
            software={"packages": packages, "torch_cuda": cuda},
        )
        found = problems(host, GPU)
        assert ("GPU driver" in found) == (wanted is not None)
        if wanted:
            assert f"driver {driver} is older than {wanted}" in found["GPU driver"].found
            assert found["GPU driver"].mend.startswith(f"driver {wanted} or later")
            # Serving on the CPU is still possible.
            assert one(host, CPU, "GPU driver").state == "note"
            assert not problems(host, CPU)

    def test_a_driver_too_old_for_cuda_bindings_leaves_no_cuda_ipc(self) -> None:
        packages = ONE_GPU.software.packages | {"cuda-bindings": "13.4.4"}
        host = differing(ONE_GPU, software={"packages": packages})
        why = "cuda_ipc: driver 570.124.06 is older than 580"
        assert problems(host, GPU)["KV caches here"].unused.startswith(why)

    def test_torch_without_cuda(self) -> None:
        packages = ONE_GPU.software.packages | {"torch": "2.13.0+cpu"}
        host = differing(ONE_GPU, software={"torch_cuda": "", "packages": packages})
        found = problems(host, GPU)
        assert list(found) == ["torch"]
        assert found["torch"].found == "2.13.0+cpu: built without CUDA"

    def test_compute_mode(self) -> None:
        host = differing(ONE_GPU, gpus=(gpu(0, compute_mode="Exclusive_Process"),))
        found = problems(host, GPU)
        assert found["GPU 0"].mend == "nvidia-smi -i 0 -c DEFAULT"
        assert "cuda_ipc: compute mode" in found["KV caches here"].unused
        assert one(host, CPU, "GPU 0").state == "note"

    def test_mig_bounds_cuda_ipc_and_serves(self) -> None:
        host = differing(ONE_GPU, gpus=(gpu(0, mig=True),))
        assert not problems(host, GPU)
        found = one(host, GPU, "GPU 0")
        assert found.state == "note"
        assert "MIG" in found.found
        assert "cuda_ipc between two of them" in found.unused
        assert found.mend.startswith("nvidia-smi -i 0 -mig 0")

    @pytest.mark.parametrize(
        ("path", "peer", "reason", "firmware"),
        [
            ("PHB", "CNS", "chipset", True),
            ("SYS", "TNS", "topology", True),
            ("PIX", "GNS", "GPUs do not", False),
        ],
    )
    def test_no_peer_access(self, path: str, peer: str, reason: str, firmware: bool) -> None:
        pair = GPUPair(first=0, second=1, path=path, peer=peer)
        found = one(differing(TWO_GPUS, topology=Topology(pairs=(pair,))), TENSORRT, "peer access")
        assert found.state == "note"
        assert f"none: {path} 0-1" in found.found
        assert reason in found.found
        assert found.unused == "cuda_ipc between instances on these GPUs"
        assert ("IOMMU" in found.mend) == firmware

    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_expandable_segments(self, name: str) -> None:
        environment = {name: "max_split_size_mb:512,expandable_segments:True"}
        host = differing(ONE_GPU, process={"environment": environment})
        found = one(host, GPU, "torch's memory")
        assert (found.state, found.mend) == ("note", f"unset {name}")
        environment[name] = "expandable_segments:False"
        host = differing(ONE_GPU, process={"environment": environment})
        assert "torch's memory" not in states(host, GPU)

    def test_wsl_has_no_cuda_ipc(self) -> None:
        host = differing(ONE_GPU, system={"kernel": "5.15.167.4-microsoft-standard-WSL2"})
        assert "cuda_ipc: WSL" in problems(host, GPU)["KV caches here"].unused
        assert one(host, GPU, "CUDA IPC").state == "note"

    def test_nixl_moves_between_gpus_of_one_host_where_it_is_wanted(self) -> None:
        deployment = with_transfer(GPU, transports=("nixl",))
        assert one(ONE_GPU, deployment, "KV caches here").found == "nixl over cuda_ipc"


class TestRDMA:
    """Each fault rules out RDMA: TCP is used instead, unless the deployment refuses it."""

    @pytest.mark.parametrize(
        ("faulty", "about", "said", "mend"),
        [
            (
                differing(ROCE, rdma=()),
                "RDMA",
                "no device",
                "a NIC",
            ),
            (
                differing(ROCE, rdma=(roce("mlx5_0", "ens1f0np0", state="DOWN"),)),
                "RDMA mlx5_0",
                "is DOWN",
                "ip link set ens1f0np0 up",
            ),
            (
                differing(
                    ROCE, rdma=(roce("mlx5_0", "", state="INIT", link_layer="InfiniBand", gids=()),)
                ),
                "RDMA mlx5_0",
                "port 1 (InfiniBand) is INIT",
                "opensm",
            ),
            (
                differing(ROCE, rdma=(roce("mlx5_0", "e", gids=roce("", "e").gids[::2]),)),
                "RDMA mlx5_0",
                "no GID of RoCE v2",
                "an IP address for e; cma_roce_mode -d mlx5_0 -p 1 -m 2",
            ),
            (
                differing(ROCE, rdma=(roce("mlx5_0", "e", accessible=False),)),
                "RDMA mlx5_0",
                "/dev/infiniband",
                "chmod a+rw",
            ),
        ],
        ids=["no device", "down", "no subnet manager", "RoCE v1 only", "no access"],
    )
    def test_a_port_of_no_use(self, faulty: Inventory, about: str, said: str, mend: str) -> None:
        found = one(faulty, PAIR, about)
        assert found.state in ("note", "missing")
        assert said in found.found
        assert mend in found.mend
        instead = one(faulty, PAIR, "KV caches to hosts")
        assert (instead.state, instead.found) == ("note", "nixl over tcp")
        assert not problems(faulty, PAIR)

        refused = problems(faulty, RDMA_ONLY)["KV caches to hosts"]
        assert refused.unused.endswith("nixl over tcp: transfer.require is rdma")
        assert refused.mend == "RDMA, as above; or transfer.require: any"

    def test_one_good_port_is_enough(self) -> None:
        ports = roce("mlx5_0", "ens1f0np0", state="DOWN"), roce("mlx5_1", "ens2f0np0")
        host = differing(ROCE, rdma=ports)
        assert not problems(host, RDMA_ONLY)
        assert one(host, RDMA_ONLY, "RDMA").found.startswith("mlx5_1:1")
        assert one(host, RDMA_ONLY, "RDMA mlx5_0").state == "note"

    def test_infiniband_needs_no_gid_of_roce(self) -> None:
        port = roce("mlx5_0", "", link_layer="InfiniBand", gids=())
        assert not problems(differing(ROCE, rdma=(port,)), RDMA_ONLY)

    def test_in_a_container_the_devices_are_its_flags(self) -> None:
        ports = (roce("mlx5_0", "e", accessible=False),)
        host = differing(ROCE, rdma=ports, process={"container": "docker"})
        assert "--device=/dev/infiniband" in one(host, PAIR, "RDMA mlx5_0").mend

    @pytest.mark.parametrize(
        ("kib", "capabilities", "enough"),
        [
            (64, (), False),
            (8 * 1024, (), False),
            (512 * 1024, (), True),
            (64, ("IPC_LOCK",), True),
            (None, (), True),
        ],
    )
    def test_memlock(self, kib: int | None, capabilities: tuple[str, ...], enough: bool) -> None:
        process = {"memlock_kib": kib, "capabilities": capabilities}
        host = differing(ROCE, process=process)
        assert ("memlock" in problems(host, RDMA_ONLY)) == (not enough)
        assert states(host, PAIR) == ({} if enough else {"memlock": "note"})
        if not enough:
            assert one(host, PAIR, "memlock").mend.startswith("ulimit -l unlimited")
            contained = differing(host, process={"container": "docker"})
            assert one(contained, PAIR, "memlock").mend == "--ulimit memlock=-1"

    @pytest.mark.parametrize(
        ("direct", "kernel", "by"),
        [
            (Direct(peermem=True), "5.4.0-200-generic", "nvidia_peermem"),
            (Direct(open_module=True), "6.8.0-51-generic", "dma-buf"),
            (Direct(open_module=True), "5.4.0-200-generic", ""),
            (Direct(), "6.8.0-51-generic", ""),
        ],
    )
    def test_gpudirect(self, direct: Direct, kernel: str, by: str) -> None:
        found = one(
            differing(ROCE, direct=direct, system={"kernel": kernel}), RDMA_ONLY, "GPUDirect RDMA"
        )
        if by:
            assert (found.state, found.found.partition(";")[0]) == ("ok", by)
        else:
            assert (found.state, found.mend) == ("note", "modprobe nvidia_peermem")

    def test_ucx_that_is_kept_to_tcp(self) -> None:
        host = differing(
            ROCE,
            ucx=UCX(version="1.23.0", transports=("tcp/eno1",)),
            process={"environment": {"UCX_TLS": "tcp"}},
        )
        assert "UCX offers no rc (UCX_TLS=tcp)" in (
            problems(host, RDMA_ONLY)["KV caches to hosts"].unused
        )

    def test_without_nixl_hosts_do_not_meet(self) -> None:
        packages = without(PACKAGES, "nixl-cu12")
        host = differing(ROCE, software={"packages": packages}, ucx=None)
        found = problems(host, PAIR)
        assert set(found) == {"nixl-cu12", "KV caches to hosts"}
        assert "pdserve[nixl]" in found["nixl-cu12"].mend
        packages = packages | {"nixl-cu13": "1.5.1"}
        host = differing(ROCE, software={"packages": packages}, gpus=(gpu(0, driver="580.65.06"),))
        assert not problems(host, PAIR)

    def test_transports_without_nixl_do_not_leave_the_host(self) -> None:
        found = problems(ROCE, with_transfer(PAIR, transports=("cuda_ipc",)))
        assert found["KV caches to hosts"].mend == "transfer.transports with nixl in it"

    def test_an_engine_that_moves_kv_caches_itself_is_bound_by_require_too(self) -> None:
        engine = Engine(kind="tensorrt_llm", gpus={"p0": (0,), "d0": (0,)})
        pair = msgspec.structs.replace(RDMA_ONLY, engine=engine)
        assert not problems(ROCE, pair)
        assert list(problems(differing(ROCE, rdma=()), pair)) == ["KV caches"]
        pair = msgspec.structs.replace(PAIR, engine=engine)
        assert one(differing(ROCE, rdma=()), pair, "KV caches").state == "note"

    def test_require_has_nothing_to_refuse_within_one_host(self) -> None:
        deployment = with_transfer(CPU, require="rdma")
        assert one(LAPTOP, deployment, "transfer.require").state == "note"
        assert not problems(LAPTOP, deployment)
        # Only TCP is refused, where nothing else is left.
        deployment = with_transfer(CPU, require="rdma", transports=("nixl",))
        assert not problems(LAPTOP, deployment)
        host = differing(LAPTOP, cma="Operation not permitted")
        assert list(problems(host, deployment)) == ["KV caches here"]

    @pytest.mark.parametrize(
        ("network", "said"),
        [
            (Network(devices=("mlx5_0:1",), gid_index=3), ""),
            (Network(devices=("eno1",)), ""),
            (Network(devices=("mlx5_7:1",)), "mlx5_7:1 is no device of this host"),
            (Network(devices=("mlx5_0:1",), gid_index=2), "GID 2 of mlx5_0:1 is IB/RoCE v1"),
            (Network(devices=("mlx5_0:1",), gid_index=9), "GID 9 of mlx5_0:1 is empty"),
        ],
    )
    def test_the_network_that_the_deployment_names(self, network: Network, said: str) -> None:
        found = problems(ROCE, with_transfer(PAIR, network=network))
        assert [finding.found.partition(",")[0] for finding in found.values()] == [said] * bool(
            said
        )
        if "GID" in said:
            assert found["transfer.network"].mend == "transfer.network.gid_index: 3, 1"


class TestMemory:
    @pytest.mark.parametrize(
        ("container", "mend"),
        [
            ("docker", "--shm-size=2g; or a smaller prefill.arena_mib"),
            ("", "mount -o remount,size=2g /dev/shm; or a smaller prefill.arena_mib"),
        ],
    )
    def test_the_64_mib_of_a_container(self, container: str, mend: str) -> None:
        host = differing(
            LAPTOP,
            system={"shm_mib": 64, "shm_free_mib": 64},
            process={"container": container, "private": ("ipc", "pid")},
        )
        found = problems(host, CPU)
        assert list(found) == ["/dev/shm"]
        assert found["/dev/shm"].found == "64 of 64 MiB free; 1,032 needed"
        assert found["/dev/shm"].mend == mend
        small = msgspec.structs.replace(CPU, prefill=Prefill(arena_mib=16))
        assert not problems(host, small)

    def test_servers_that_run_have_their_memory(self) -> None:
        host = differing(LAPTOP, system={"shm_free_mib": 10}, servers=(server("local", pid=4242),))
        assert not problems(host, CPU)
        assert "local (process 4242)" in one(host, CPU, "servers").found

    def test_only_arenas_of_this_host_count(self) -> None:
        pair = msgspec.structs.replace(PAIR, engine=Engine())
        host = differing(ROCE, system={"shm_free_mib": 520})
        assert "; 517 needed" in one(host, pair, "/dev/shm").found
        decode = differing(host, servers=(server("a", here=False), server("b")))
        assert "; 1 needed" in one(decode, pair, "/dev/shm").found

    def test_private_arenas_are_not_in_dev_shm(self) -> None:
        deployment = with_transfer(CPU, transports=("nixl",))
        assert "; 8 needed" in one(LAPTOP, deployment, "/dev/shm").found

    def test_shared_memory_is_memory(self) -> None:
        host = differing(LAPTOP, system={"available_mib": 900})
        assert list(problems(host, CPU)) == ["memory"]

    def test_no_dev_shm(self) -> None:
        host = differing(LAPTOP, system={"shm_mib": 0, "shm_free_mib": 0})
        assert set(problems(host, CPU)) == {"/dev/shm", "KV caches here"}

    def test_few_open_files_are_worth_a_note(self) -> None:
        found = one(differing(LAPTOP, process={"nofile": 1024}), CPU, "limits")
        assert (found.state, found.found) == (
            *("note", "open files: 1,024; locked memory: 8,192 KiB"),
        )

    @pytest.mark.parametrize(
        ("files", "state"), [(64, "problem"), (256, "note"), (4095, "note"), (4096, "ok")]
    )
    def test_open_files_that_servers_can_have(self, files: int, state: str) -> None:
        host = differing(LAPTOP, process={"nofile": files})
        found = one(host, CPU, "limits")
        assert found.state == state
        assert ("cannot start" in found.unused) == (files == 64)
        assert (list(problems(host, CPU)) == ["limits"]) == (files == 64)

    def test_namespaces(self) -> None:
        process = {"container": "docker", "private": ("ipc", "pid")}
        found = one(differing(LAPTOP, process=process), CPU, "container")
        assert found.state == "note"
        assert "--ipc=host --pid=host" in found.mend
        found = one(differing(LAPTOP, process={"container": "docker"}), CPU, "container")
        assert found.state == "ok"

    @pytest.mark.parametrize(
        ("process", "mend"),
        [
            ({"ptrace_scope": 2}, "sysctl kernel.yama.ptrace_scope=1"),
            ({"container": "docker", "seccomp": True}, "--cap-add=SYS_PTRACE"),
            ({}, "seccomp, SELinux"),
        ],
    )
    def test_cma(self, process: dict[str, Any], mend: str) -> None:
        host = differing(LAPTOP, cma="Operation not permitted", process=process)
        found = one(host, CPU, "CMA")
        assert found.state == "missing"
        assert mend in found.mend
        nixl = with_transfer(CPU, transports=("nixl",))
        assert one(host, nixl, "CMA").state == "note"
        assert one(host, nixl, "KV caches here").found == "nixl over tcp"
        assert one(LAPTOP, nixl, "KV caches here").found == "nixl over cma"

    def test_each_flexible_instance_may_need_an_arena(self) -> None:
        [server] = CPU.servers
        flexible = msgspec.structs.replace(server, flexible=server.decode)
        deployment = msgspec.structs.replace(CPU, servers=(flexible,))
        host = differing(LAPTOP, system={"shm_mib": 64, "shm_free_mib": 64})
        found = problems(host, deployment)["/dev/shm"].found
        assert found == "64 of 64 MiB free; 2,056 needed"


class TestTensorRTLLM:
    @pytest.mark.parametrize(
        ("version", "fine"),
        [
            ("0.21.0", False),
            ("1.0.0", True),
            ("1.0.3.2510", True),
            ("1.2.1", True),
            ("1.3.0rc25", True),
            ("1.4.0rc1", True),
            ("2.0.0", True),
        ],
    )
    def test_versions(self, version: str, fine: bool) -> None:
        host = differing(TWO_GPUS, software={"packages": PACKAGES | {"tensorrt_llm": version}})
        assert list(problems(host, TENSORRT)) == ([] if fine else ["tensorrt_llm"])
        if not fine:
            assert states(host, GPU)["tensorrt_llm"] == "note"
        ended = conclusion(host, GPU, advice(host, GPU))
        assert (ended.engines["tensorrt_llm"] == "") == fine

    @pytest.mark.parametrize("deployment", [TENSORRT, GPU])
    def test_a_version_that_was_not_read_is_a_note(self, deployment: Deployment) -> None:
        """What is there decides: the engine looks for each name that it uses."""
        packages = PACKAGES | {"tensorrt_llm": "2.0.0"}
        found = one(
            differing(TWO_GPUS, software={"packages": packages}), deployment, "tensorrt_llm"
        )
        assert found.state == "note"
        assert found.found == f"2.0.0: newer than the versions that were read, {api.VERSIONS}"
        assert "tensorrt_llm" not in states(TWO_GPUS, deployment)

    @pytest.mark.parametrize(
        ("why", "mend"),
        [
            (
                "cannot import name 'PartReasoningText' from 'openai.types'",
                "pip install -U 'openai>=1.108.1,<2'",
            ),
            ("libcuda.so.1: cannot open shared object file", "--gpus all"),
            ("tensorrt_llm 1.2.1 has no LLM.generate_async", "target gpu"),
        ],
    )
    def test_its_own_error_is_shown_and_mended(self, why: str, mend: str) -> None:
        host = differing(TWO_GPUS, software={"tensorrt_llm": why})
        found = problems(host, TENSORRT)
        assert list(found) == ["tensorrt_llm"]
        assert found["tensorrt_llm"].found == f"1.3.0rc25: {why}"
        assert mend in found["tensorrt_llm"].mend
        assert "numpy" not in found["tensorrt_llm"].mend
        ended = conclusion(host, TENSORRT, advice(host, TENSORRT))
        assert ended.engines["tensorrt_llm"] == why

    def test_an_import_that_takes_too_long_is_said(self) -> None:
        host = differing(TWO_GPUS, unknown={"tensorrt_llm": "its import has not ended in 120 s"})
        found = one(host, TENSORRT, "tensorrt_llm")
        assert (found.state, found.found) == (
            *("note", "not known: its import has not ended in 120 s"),
        )
        assert "import tensorrt_llm.llmapi" in found.mend
        assert not problems(host, TENSORRT)

    @pytest.mark.parametrize(
        ("backend", "variables", "said"),
        [
            ("NIXL", {"TRTLLM_USE_UCX_KVCACHE": "1"}, "the deployment's backend is NIXL"),
            ("DEFAULT", {"TRTLLM_USE_MPI_KVCACHE": "1"}, "the deployment's backend is DEFAULT"),
            ("UCX", {"TRTLLM_USE_MOONCAKE_KVCACHE": "1"}, "the deployment's backend is UCX"),
            ("NIXL", {"TRTLLM_USE_NIXL_KVCACHE": "1"}, ""),
            ("NIXL", {"TRTLLM_USE_UCX_KVCACHE": "0"}, ""),
            ("NIXL", {}, ""),
        ],
    )
    def test_variables_that_choose_another_backend(
        self, backend: Any, variables: dict[str, str], said: str
    ) -> None:
        options = LlmOptions(cache_transceiver_config=CacheTransceiverConfig(backend=backend))
        engine = msgspec.structs.replace(TENSORRT.engine, tensorrt_llm=options)
        deployment = msgspec.structs.replace(TENSORRT, engine=engine)
        environment = TWO_GPUS.process.environment | variables
        host = differing(TWO_GPUS, process={"environment": environment})
        found = states(host, deployment)
        assert found.get("transceiver") == ("note" if said else None)
        if said:
            finding = one(host, deployment, "transceiver")
            [name] = variables
            assert finding.found == f"{name}=1; {said}"
            assert finding.mend.startswith(f"unset {name}")
            assert ("backend:" in finding.mend) == (backend == "DEFAULT")
        assert "transceiver" not in states(host, GPU)

    @pytest.mark.parametrize(
        ("version", "variables", "noted"),
        [
            ("1.3.0rc25", {}, True),
            ("1.3.0rc25", {"TRTLLM_NO_USAGE_STATS": "0", "DO_NOT_TRACK": "no"}, True),
            ("1.3.0rc25", {"TRTLLM_NO_USAGE_STATS": "1"}, False),
            ("1.3.0rc25", {"TELEMETRY_DISABLED": "True"}, False),
            ("1.3.0rc25", {"DO_NOT_TRACK": "1"}, False),
            ("1.2.1", {}, False),
        ],
    )
    def test_statistics_of_use(self, version: str, variables: dict[str, str], noted: bool) -> None:
        host = differing(
            TWO_GPUS,
            software={"packages": PACKAGES | {"tensorrt_llm": version}},
            process={"environment": variables},
        )
        found = states(host, TENSORRT)
        assert found.get("statistics of use") == ("note" if noted else None)
        if noted:
            mend = one(host, TENSORRT, "statistics of use").mend
            assert mend.startswith("TRTLLM_NO_USAGE_STATS=1")
        assert "statistics of use" not in states(host, GPU)

    def test_what_flexible_instances_cost(self) -> None:
        [server, *others] = TENSORRT.servers
        flexible = msgspec.structs.replace(server, flexible=server.decode)
        deployment = msgspec.structs.replace(TENSORRT, servers=(flexible, *others))
        found = one(TWO_GPUS, deployment, "flexible instances")
        assert (found.state, found.found) == ("note", ", ".join(server.decode))
        assert "overlap scheduler" in found.unused
        assert "flexible instances" not in states(TWO_GPUS, TENSORRT)


class TestChannel:
    BLS = msgspec.structs.replace(CPU, gateway=Gateway(channel="bls"))

    @pytest.mark.parametrize(
        ("triton", "named"),
        [
            ("2.51.0", "Triton 2.51.0"),
            ("2.70.0", "Triton 2.70.0"),
            ("not known", "a Triton of a version not known"),
            ("2.71.0", ""),
            ("2.72.0dev", ""),
        ],
    )
    def test_bls_has_a_minimum(self, triton: str, named: str) -> None:
        """It is a note: 24.10 serves by BLS, until many requests are cancelled at once."""
        host = differing(LAPTOP, software={"triton": triton})
        found = [one for one in advice(host, self.BLS) if one.about == "gateway.channel"]
        assert not problems(host, self.BLS)
        assert [(one.state, one.found) for one in found] == [
            ("note", f"bls, with {named}; the minimum is 2.71 (release 26.07)")
        ] * bool(named)
        for finding in found:
            assert "gateway.channel: grpc" in finding.mend
            assert "26.07" in finding.mend
        assert found == hindrances(host, self.BLS), "`pdctl up` says so, too"
        assert "gateway.channel" not in states(host, CPU)

    def test_a_host_without_a_gateway_calls_nothing(self) -> None:
        host = differing(LAPTOP, servers=(server("local", here=False),))
        assert "gateway.channel" not in states(host, self.BLS)


class TestSoftware:
    @pytest.mark.parametrize(
        ("changed", "about"),
        [
            ({"python": "3.13.1"}, "Python"),
            ({"python": "3.9.20"}, "Python"),
            ({"glibc": "2.31"}, "glibc"),
            ({"triton": ""}, "Triton"),
            ({"triton": "2.40.0"}, "Triton"),
            ({"packages": LAPTOP.software.packages | {"numpy": "2.4.6"}}, "numpy"),
            ({"packages": LAPTOP.software.packages | {"torch": "2.9.1"}}, "torch"),
            ({"packages": without(LAPTOP.software.packages, "tritonclient")}, "tritonclient"),
        ],
    )
    def test_nothing_is_served_with_it(self, changed: dict[str, Any], about: str) -> None:
        found = problems(differing(LAPTOP, software=changed), CPU)
        assert list(found) == [about]
        assert found[about].mend

    def test_numpy_2_goes_with_a_later_triton(self) -> None:
        packages = LAPTOP.software.packages | {"numpy": "2.4.6"}
        host = differing(LAPTOP, software={"packages": packages, "triton": "2.61.0"})
        assert not problems(host, CPU)

    def test_torch_of_another_engine_may_be_of_any_version(self) -> None:
        host = differing(TWO_GPUS, software={"packages": PACKAGES | {"torch": "2.9.1"}})
        assert not problems(host, TENSORRT)
        assert one(host, TENSORRT, "torch").state == "note"

    def test_a_triton_that_does_not_tell_its_version(self) -> None:
        assert not problems(differing(LAPTOP, software={"triton": "not known"}), CPU)

    def test_another_machine(self) -> None:
        assert list(problems(differing(LAPTOP, system={"machine": "aarch64"}), CPU)) == ["machine"]

    def test_the_ranges_are_those_of_the_project(self) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        checked = {"nixl-cu12", "nixl-cu13", "cuda-bindings", "torch", "numpy", "tritonclient"}
        assert checked == set(NAMES) - {"tensorrt_llm"}
        for name in checked:
            for versions in re.findall(rf'"{name}(?:\[[^]]*\])?([<>=][^"]*)"', text):
                assert SpecifierSet(versions) == SUPPORTED[name], name
        [versions] = re.findall(r'requires-python = "(.*)"', text)
        assert SpecifierSet(versions) == SUPPORTED["Python"]
        assert READ["tensorrt_llm"] is api.VERSIONS

    @pytest.mark.parametrize("name", ["numpy", "torch"])
    @pytest.mark.parametrize(
        "software",
        [
            {"triton": "2.71.0", "embedded": False},
            {"triton": "2.51.0", "embedded": False},
            {"triton": "2.51.0", "embedded": True, "packages": {"tensorrt_llm": "1.2.1"}},
        ],
        ids=["newer", "older", "TensorRT-LLM"],
    )
    def test_nothing_is_installed_over_what_an_image_was_built_against(
        self, software: dict[str, Any], name: str
    ) -> None:
        """Whatever is wrong there, numpy and torch stay: TensorRT-LLM was built against them."""
        packages = LAPTOP.software.packages | {"numpy": "1.24.4", "torch": "2.10.0a0"}
        packages |= software.get("packages", {})
        host = differing(LAPTOP, software=software | {"packages": packages})
        found = problems(host, CPU)
        assert set(found) == {"numpy", "torch"}
        assert "pip" not in found[name].mend
        assert f"built against {name} {packages[name]}" in found[name].mend
        if name == "numpy":
            host = differing(host, software={"packages": packages | {"numpy": "2.4.6"}})
            assert all("pip" not in one.mend for one in problems(host, CPU).values())

    def test_numpy_is_mended_beside_the_embedded_triton(self) -> None:
        packages = LAPTOP.software.packages | {"numpy": "2.4.6"}
        host = differing(LAPTOP, software={"packages": packages})
        assert problems(host, CPU)["numpy"].mend == f"pip install 'numpy{SUPPORTED['numpy']}'"

    @pytest.mark.parametrize("name", ["nixl-cu12", "cuda-bindings"])
    def test_the_project_is_not_installed_anew_in_an_image(self, name: str) -> None:
        """With its extras, pip would give numpy the version of the embedded Triton."""
        packages = without(PACKAGES, name)
        image = differing(ROCE, software={"packages": packages, "embedded": False})
        assert one(image, PAIR, name).mend == f"pip install '{name}{SUPPORTED[name]}'"
        here = differing(ROCE, software={"packages": packages})
        assert "pdserve[" in one(here, PAIR, name).mend


class TestServers:
    def test_a_port_that_somebody_has(self) -> None:
        taken = server("local", holder="taken by python3 (process 17)")
        found = problems(differing(LAPTOP, servers=(taken,)), CPU)["server local"]
        assert found.found == "grpc_port 8001: taken by python3 (process 17)"
        assert found.mend == "end that process, or another servers[].grpc_port"

    def test_none_is_of_this_host(self) -> None:
        host = differing(ROCE, servers=(server("a", here=False), server("b", here=False)))
        found = problems(host, PAIR)["servers"]
        assert "10.0.0.1, 10.0.0.2" in found.found

    def test_a_checkout_where_nothing_can_be_served(self) -> None:
        assert problems(differing(LAPTOP, checkout="the path has 'é'"), CPU)["checkout"].mend

    def test_no_model(self) -> None:
        host = differing(LAPTOP, model="/models/m is not there")
        assert problems(host, CPU)["model"].found.startswith("/models/m")

    def test_a_model_in_order_is_said(self) -> None:
        (told,) = (found for found in advice(LAPTOP, CPU) if found.about == "model")
        assert told.state == "ok"
        assert told.found.startswith("/models/m: its files are whole")

    def test_no_gateway_at_all_is_said(self) -> None:
        mute = msgspec.structs.replace(
            CPU, servers=tuple(msgspec.structs.replace(one, gateway=False) for one in CPU.servers)
        )
        told = [found for found in advice(LAPTOP, mute) if found.about == "gateways"]
        assert [found.state for found in told] == ["note"]
        assert not [found for found in advice(LAPTOP, CPU) if found.about == "gateways"]


def test_what_could_not_be_found_out_is_said() -> None:
    why = "nvidia-smi has not answered in 10 s"
    host = differing(LAPTOP, unknown={"GPUs": why, "system": "gone"}, system={"machine": ""})
    found = [finding for finding in advice(host, CPU) if finding.found == f"not known: {why}"]
    assert [(finding.about, finding.state) for finding in found] == [("GPUs", "note")]
    assert "/dev/shm" not in {finding.about for finding in advice(host, CPU)}
    assert not problems(host, CPU)


@pytest.mark.parametrize("deployment", [CPU, GPU, TENSORRT, PAIR, RDMA_ONLY])
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_whatever_is_wrong_can_be_mended_and_all_is_printed(
    host: Inventory, deployment: Deployment
) -> None:
    found = advice(host, deployment)
    assert all(finding.mend for finding in found if finding.state in ("missing", "problem"))
    assert all(finding.used or finding.unused for finding in found if finding.state == "note")
    console = Console(width=80, record=True)
    console.print(report(found, conclusion(host, deployment, found), "some.yaml"))
    text = " ".join(console.export_text().split())
    for finding in found:
        assert finding.state in text
        assert finding.about in text
    served = conclusion(host, deployment, found).served
    assert f"some.yaml {'can' if served else 'cannot'} be served here" in text
