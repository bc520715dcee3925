"""Tests for the probes of `pdctl doctor`: kernel files, a fake nvidia-smi, and this host."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pdctl import cli, paths
from pdctl.doctor.examination import Examination
from pdctl.doctor.inventory import Direct, Gid, GPUNic, GPUPair, Inventory, RDMAPort, Topology
from pdctl.doctor.probe import (
    cma,
    command,
    gpus,
    host,
    rdma,
    software,
    system,
    tensorrt_llm,
    ucx,
)
from pdctl.doctor.probe.host import probe
from pdctl.doctor.probe.model import model
from pdctl.doctor.probe.servers import servers
from pdserve.config import Decode, Deployment, Engine, Network, Prefill, Server, Transfer
from pdserve.engines.build import context_length
from pdserve.errors import DeploymentError
from tests.fakes import importing
from tests.servers import free_ports

OPEN_MODULE = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder@x)
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
MODULES = """\
nvidia_peermem 16384 0 - Live 0x0000000000000000
nvidia 11538432 86 nvidia_uvm,nvidia_peermem,nvidia_modeset, Live 0x0000000000000000 (OE)
mlx5_ib 475136 0 - Live 0x0000000000000000
"""
MEMINFO = """\
MemTotal:       24684096 kB
MemFree:         1000000 kB
MemAvailable:   20480000 kB
HugePages_Total:       0
"""
STATUS = """\
Name:	python
CapPrm:	0000000000000000
CapEff:	{effective:016x}
NoNewPrivs:	0
Seccomp:	{seccomp}
"""
UUID = "GPU-11111111-2222-3333-4444-555555555555"
QUERY = f"""\
0, {UUID}, NVIDIA H100 80GB HBM3, 570.124.06, 81559, Default, Disabled
1, {UUID[:-1]}6, NVIDIA GB10, 570.124.06, [N/A], Exclusive_Process, Enabled
"""
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\tSYS\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tPXB\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tPXB\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n"
    "  X    = Self\n"
    "  PIX  = Connection traversing at most a single PCIe bridge\n"
    "  NV#  = Connection traversing a bonded set of # NVLinks\n"
    "\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_1\n"
)
PEERS = (
    " \t\x1b[4mGPU0\tGPU1\x1b[0m\t\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n"
    "\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n  CNS  = Chipset not supported\n"
)
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a fake nvidia-smi on PATH, the only program there."""
    file = written(folder, {"bin/nvidia-smi": f"#!/bin/sh\n{script}"}) / "bin" / "nvidia-smi"
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")


class TestRDMA:
    def tree(self, root: Path) -> Path:
        port = "sys/class/infiniband/mlx5_0/ports/1"
        rows = [
            ("fe80:0000:0000:0000:0ac0:ebff:fe12:3456", "IB/RoCE v1", "ens1f0np0"),
            ("fe80:0000:0000:0000:0ac0:ebff:fe12:3456", "RoCE v2", "ens1f0np0"),
            ("0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2", "ens1f0np0"),
        ]
        written(
            root,
            {
                f"{port}/state": "4: ACTIVE\n",
                f"{port}/link_layer": "Ethernet\n",
                f"{port}/rate": "200 Gb/sec (4X HDR)\n",
                # For empty rows the kernel has neither type nor netdev.
                **{f"{port}/gids/{index}": f"{EMPTY}\n" for index in range(3, 12)},
                "sys/class/infiniband/mlx5_0/device/infiniband_verbs/uverbs0/dev": "231:192\n",
                "dev/infiniband/uverbs0": "",
                "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
                "sys/class/infiniband/mlx5_1/ports/1/link_layer": "InfiniBand\n",
                "sys/class/infiniband/mlx5_1/ports/1/rate": "10 Gb/sec (4X SDR)\n",
                "sys/class/infiniband/mlx5_1/ports/1/gids/0": f"{EMPTY}\n",
                # The device node has not been passed to this container.
                "sys/class/infiniband/mlx5_1/device/infiniband_verbs/uverbs1/dev": "231:193\n",
            },
        )
        for index, (gid, kind, netdev) in enumerate(rows):
            written(
                root,
                {
                    f"{port}/gids/{index}": f"{gid}\n",
                    f"{port}/gid_attrs/types/{index}": f"{kind}\n",
                    f"{port}/gid_attrs/ndevs/{index}": f"{netdev}\n",
                },
            )
        return root

    def test_ports_with_their_gids_and_whether_they_may_be_opened(self, tmp_path: Path) -> None:
        roce, infiniband = rdma.ports(self.tree(tmp_path))
        assert roce == RDMAPort(
            device="mlx5_0",
            port=1,
            state="ACTIVE",
            link_layer="Ethernet",
            rate="200 Gb/sec (4X HDR)",
            gids=(
                Gid(
                    index=0,
                    gid="fe80:0000:0000:0000:0ac0:ebff:fe12:3456",
                    kind="IB/RoCE v1",
                    netdev="ens1f0np0",
                ),
                Gid(
                    index=1,
                    gid="fe80:0000:0000:0000:0ac0:ebff:fe12:3456",
                    kind="RoCE v2",
                    netdev="ens1f0np0",
                ),
                Gid(
                    index=2,
                    gid="0000:0000:0000:0000:0000:ffff:0a00:0001",
                    kind="RoCE v2",
                    netdev="ens1f0np0",
                ),
            ),
            accessible=True,
        )
        assert (infiniband.device, infiniband.state) == ("mlx5_1", "DOWN")
        assert infiniband.gids == ()
        assert not infiniband.accessible

    def test_rows_are_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        gids = {
            f"sys/class/infiniband/mlx5_0/ports/1/gids/{index}": f"fe80::{index}\n"
            for index in (10, 2)
        }
        [port] = rdma.ports(written(tmp_path, gids))
        assert [gid.index for gid in port.gids] == [2, 10]

    def test_a_host_without_any(self, tmp_path: Path) -> None:
        assert rdma.ports(tmp_path) == ()


class TestSystem:
    def tree(self, root: Path, effective: int = 0, seccomp: int = 0, ipc: int = 1) -> Path:
        written(
            root,
            {
                "proc/meminfo": MEMINFO,
                "proc/sys/kernel/osrelease": "6.8.0-51-generic\n",
                "proc/self/status": STATUS.format(effective=effective, seccomp=seccomp),
                "proc/self/ns/.keep": "",
            },
        )
        (root / "proc/self/ns/ipc").symlink_to(f"ipc:[{ipc}]")
        (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
        return root

    def test_memory(self, tmp_path: Path) -> None:
        found = system.system(self.tree(tmp_path))
        assert found.kernel == "6.8.0-51-generic"
        assert (found.memory_mib, found.available_mib) == (24_105, 20_000)
        assert (found.shm_mib, found.shm_free_mib) == (0, 0)
        (tmp_path / "dev" / "shm").mkdir(parents=True)
        size = os.statvfs(tmp_path)
        assert system.system(tmp_path).shm_mib == size.f_blocks * size.f_frsize >> 20

    @pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
    def test_a_container_has_what_its_group_may_have(self, tmp_path: Path, name: str) -> None:
        written(self.tree(tmp_path), {f"sys/fs/cgroup/{name}": f"{4 << 30}\n"})
        found = system.system(tmp_path)
        assert (found.memory_mib, found.available_mib) == (4096, 4096)

    @pytest.mark.parametrize("limit", ["max", str(1 << 62)])
    def test_a_group_without_a_limit(self, tmp_path: Path, limit: str) -> None:
        written(self.tree(tmp_path), {"sys/fs/cgroup/memory.max": f"{limit}\n"})
        assert system.system(tmp_path).memory_mib == 24_105

    def test_isolation(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path, effective=1 << 19 | 1 << 21, seccomp=2)
        written(root, {"proc/sys/kernel/yama/ptrace_scope": "1\n", ".dockerenv": ""})
        found = system.process(root, {"UCX_TLS": "tcp", "HOME": "/root"})
        assert found.capabilities == ("SYS_PTRACE",)
        assert found.seccomp
        assert found.ptrace_scope == 1
        assert found.container == "docker"
        assert found.private == ("ipc",)
        assert found.environment == {"UCX_TLS": "tcp"}

    def test_isolation_without_limits(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path, effective=1 << 14, ipc=0xEFFFFFFF)
        found = system.process(root, {})
        assert found.capabilities == ("IPC_LOCK",)
        assert not found.seccomp
        assert (found.ptrace_scope, found.container, found.private) == (0, "", ())
        written(root, {"run/.containerenv": ""})
        assert system.process(root, {}).container == "podman"
        kubernetes = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        assert system.process(root, kubernetes).container == "kubernetes"

    def test_limits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import resource

        limits = {resource.RLIMIT_MEMLOCK: (64 << 10, -1), resource.RLIMIT_NOFILE: (256, 4096)}
        monkeypatch.setattr(resource, "getrlimit", lambda which: limits[which])
        found = system.process(self.tree(tmp_path), {})
        assert (found.memlock_kib, found.nofile) == (64, 4096)


class TestGPUs:
    def test_as_nvidia_smi_lists_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvidia_smi(tmp_path, monkeypatch, f"cat <<'END'\n{QUERY}END\n")
        first, second = gpus.gpus(tmp_path)
        assert (first.index, first.name) == (0, "NVIDIA H100 80GB HBM3")
        assert first.uuid == UUID
        assert (first.driver, first.memory_mib) == ("570.124.06", 81559)
        assert (first.compute_mode, first.mig) == ("Default", False)
        assert (second.memory_mib, second.compute_mode, second.mig) == (
            *(0, "Exclusive_Process", True),
        )

    def test_paths_and_peers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written(tmp_path, {"m": TOPOLOGY, "p2p": PEERS})
        nvidia_smi(tmp_path, monkeypatch, f'cat "{tmp_path}/${{2#-}}"\n')
        assert gpus.topology(gpus.listed(QUERY)) == Topology(
            pairs=(GPUPair(first=0, second=1, path="NV18", peer="OK"),),
            nics=tuple(
                GPUNic(gpu=gpu, device=device, path=path)
                for gpu, device, path in (
                    *((0, "mlx5_0", "PIX"), (0, "mlx5_1", "SYS")),
                    *((1, "mlx5_0", "SYS"), (1, "mlx5_1", "PXB")),
                )
            ),
        )
        assert gpus.topology(()) == Topology()

    def test_cells_of_a_matrix_by_row_and_column(self) -> None:
        refused = PEERS.replace("GPU0\tX\tOK", "GPU0\tX\tCNS")
        assert gpus.matrix(refused)["GPU0", "GPU1"] == "CNS"
        assert gpus.matrix(refused)["GPU1", "GPU0"] == "OK"
        assert gpus.matrix("") == {}

    def test_no_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert gpus.gpus(tmp_path) == ()
        written(tmp_path, {"proc/driver/nvidia/version": OPEN_MODULE})
        with pytest.raises(command.Unknown, match="a driver, but no nvidia-smi"):
            gpus.gpus(tmp_path)

    def test_a_driver_that_does_not_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
        nvidia_smi(tmp_path, monkeypatch, f'echo "{failed}"; exit 9\n')
        with pytest.raises(command.Unknown, match=f"^nvidia-smi: {failed}"):
            gpus.gpus(tmp_path)
        monkeypatch.setattr(command, "TIMEOUT_S", 0.2)
        nvidia_smi(tmp_path, monkeypatch, "exec sleep 60\n")
        with pytest.raises(command.Unknown, match="nvidia-smi has not answered"):
            gpus.gpus(tmp_path)

    @pytest.mark.parametrize(
        ("files", "found"),
        [
            ({}, Direct()),
            ({"proc/modules": MODULES}, Direct(peermem=True)),
            ({"proc/modules": MODULES.partition("\n")[2]}, Direct()),
            ({"proc/driver/nvidia/version": OPEN_MODULE}, Direct(open_module=True)),
            (
                {
                    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module"
                    "  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"
                },
                Direct(),
            ),
        ],
    )
    def test_gpudirect(self, tmp_path: Path, files: dict[str, str], found: Direct) -> None:
        assert gpus.direct(written(tmp_path, files)) == found


class TestTensorRTLLM:
    """The import in a separate process, of the fake and of packages that cannot be used."""

    def environment(self, folder: Path | str) -> dict[str, str]:
        path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
        return dict(os.environ) | {"PYTHONPATH": path}

    def package(self, folder: Path, code: str) -> dict[str, str]:
        """Make a package whose llmapi runs some code when it is imported."""
        written(
            folder,
            {
                "tensorrt_llm/__init__.py": "__version__ = '1.2.1'\nprint('[TensorRT-LLM] 1.2.1')",
                "tensorrt_llm/llmapi.py": code,
            },
        )
        return self.environment(folder)

    def test_one_that_can_be_used(self) -> None:
        assert tensorrt_llm.fault(self.environment(importing.FAKES)) == ""

    def test_its_own_error_is_the_reason(self, tmp_path: Path) -> None:
        said = "cannot import name 'PartReasoningText' from 'openai.types.responses'"
        environment = self.package(tmp_path, f'raise ImportError("""{said}\n(old)""")')
        assert tensorrt_llm.fault(environment) == f"it cannot be imported: {said} (old)"

    def test_an_error_of_any_kind_is_a_reason(self, tmp_path: Path) -> None:
        environment = self.package(tmp_path, "raise RuntimeError('no CUDA device')")
        found = tensorrt_llm.fault(environment)
        assert found == "it cannot be used: RuntimeError('no CUDA device')"

    def test_a_crash_is_a_reason(self, tmp_path: Path) -> None:
        environment = self.package(tmp_path, "import os; os.abort()")
        found = tensorrt_llm.fault(environment)
        assert found.startswith("its import ends the process: ")
        assert found.endswith("ended by signal 6, Aborted")

    def test_one_that_does_not_end_is_not_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tensorrt_llm, "TIMEOUT_S", 1.0)
        environment = self.package(tmp_path, "import time; time.sleep(60)")
        with pytest.raises(command.Unknown, match="its import has not ended in 1 s"):
            tensorrt_llm.fault(environment)

    @pytest.mark.parametrize("kind", ["tensorrt_llm", "torch"])
    def test_it_is_imported_where_it_is_the_engine(
        self, kind: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others need not wait for it."""
        installed = msgspec.structs.replace(software.software(), packages={"tensorrt_llm": "1.2.1"})
        asked: list[str] = []

        def fault(environment: Any) -> str:
            asked.append(environment["UCX_IB_GID_INDEX"])
            raise command.Unknown("its import has not ended in 120 s")

        monkeypatch.setattr(host, "software", lambda: installed)
        monkeypatch.setattr(tensorrt_llm, "fault", fault)
        deployment = Deployment(
            model="m",
            servers=(Server("far", host="192.0.2.7"),),
            engine=Engine(kind=kind),
            transfer=Transfer(network=Network(devices=("lo",), gid_index=3)),
        )
        found = probe(deployment)
        assert asked == ["3"] * (kind == "tensorrt_llm"), "in the servers' environment"
        assert found.unknown.get("tensorrt_llm") == (
            "its import has not ended in 120 s" if asked else None
        )


class TestTriton:
    """The version of the Triton that would serve here, as files and variables tell it."""

    @pytest.fixture
    def image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Put a tritonserver on PATH, as in NVIDIA's images."""
        monkeypatch.delenv("TRITON_SERVER_VERSION", raising=False)
        binary = written(tmp_path, {"bin/tritonserver": "#!/bin/sh\n"}) / "bin" / "tritonserver"
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{binary.parent}:/usr/bin:/bin")
        return tmp_path

    def test_the_one_of_an_image(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not taken for the one in the wheel, which is installed here as well."""
        found = software.software()
        assert (found.triton, found.embedded) == ("not known", False)
        monkeypatch.setenv("TRITON_SERVER_VERSION", "2.71.0")
        assert software.software().triton == "2.71.0"
        written(image, {"TRITON_VERSION": "2.72.0\n"})
        assert software.software().triton == "2.72.0"

    def test_the_embedded_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_SERVER_VERSION", "2.71.0")
        found = software.software()
        if found.embedded:  # as in the set-up of this project
            assert found.triton == "2.51.0"


class TestCMA:
    def test_cma_on_this_host(self) -> None:
        found = system.process(Path("/"), {})
        if "SYS_PTRACE" not in found.capabilities or found.seccomp:
            pytest.skip("may be forbidden here")
        assert cma.cma() == ""

    def test_the_word_has_to_arrive(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        memory = ctypes.create_string_buffer(len(cma.WORD))
        assert cma.read(libc, os.getpid(), memory) == errno.EIO
        memory.raw = cma.WORD
        assert cma.read(libc, os.getpid(), memory) == 0

    def test_an_error_is_named(self) -> None:
        ended = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
        os.waitpid(ended, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        memory = ctypes.create_string_buffer(len(cma.WORD))
        assert cma.read(libc, ended, memory) == errno.ESRCH


class TestUCX:
    @pytest.fixture(autouse=True)
    def _there(self) -> None:
        if software.nixl_library() is None:
            pytest.skip("no nixl")

    def test_what_the_installed_one_offers(self) -> None:
        found = ucx.ucx(os.environ)
        assert found is not None
        assert found.version[0].isdigit()
        assert "tcp/lo" in found.transports
        assert "cma/memory" in found.transports

    def test_within_what_the_environment_allows(self) -> None:
        found = ucx.ucx(os.environ | {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"})
        assert found is not None
        assert found.transports == ("tcp/lo",)

    def test_one_that_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ucx, "nixl_library", lambda: "libucp.so.none")
        with pytest.raises(command.Unknown, match=r"libucp\.so\.none"):
            ucx.ucx(os.environ)


class TestSoftware:
    def test_versions_without_an_import(self) -> None:
        found = software.software()
        assert found.python == platform.python_version()
        assert found.packages["numpy"] == np.__version__
        assert found.glibc == platform.libc_ver()[1]

    @pytest.mark.parametrize(("line", "cuda"), [("'12.8'", "12.8"), ("None", "")])
    def test_the_cuda_of_torch_is_in_its_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, cuda: str
    ) -> None:
        folder = "torch-2.13.1.dist-info"
        files = {
            f"{folder}/METADATA": "Metadata-Version: 2.4\nName: torch\nVersion: 2.13.1\n",
            f"{folder}/RECORD": "torch/__init__.py,,\ntorch/version.py,,\n",
            "torch/version.py": f"debug = False\ncuda: Optional[str] = {line}\nhip = None\n",
        }
        monkeypatch.syspath_prepend(str(written(tmp_path, files)))
        found = software.software()
        assert (found.packages["torch"], found.torch_cuda) == ("2.13.1", cuda)

    def test_tritons_in_images_have_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(tmp_path, {"bin/tritonserver": "", "TRITON_VERSION": "2.61.0\n"})
        (tmp_path / "bin" / "tritonserver").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        assert software.software().triton == "2.61.0"


class TestServers:
    def test_who_has_a_port(self) -> None:
        http, grpc, metrics = free_ports(3)
        deployment = Deployment(
            model="m",
            servers=(Server("doctored", http_port=http, grpc_port=grpc, metrics_port=metrics),),
        )
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", grpc))
            taken.listen()
            [found] = servers(deployment)
            assert (found.here, found.pid) == (True, None)
            assert [(port.use, port.number) for port in found.ports] == [
                *(("http", http), ("grpc", grpc), ("metrics", metrics))
            ]
            free, held, last = (port.holder for port in found.ports)
            assert (free, last) == ("", "")
            assert f"(process {os.getpid()})" in held

    def test_a_server_of_another_host(self) -> None:
        deployment = Deployment(model="m", servers=(Server("far", host="192.0.2.7"),))
        [found] = servers(deployment)
        assert (found.here, found.ports) == (False, ())


def small_model(folder: Path) -> None:
    """Write files that can be read, but that no engine could compute with."""
    (folder / "config.json").write_text('{"vocab_size": 8, "num_key_value_heads": 3}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")


class TestModel:
    """Every reason why the model's files cannot be used; ``deployment`` itself is valid."""

    @pytest.fixture
    def deployment(self, tmp_path: Path) -> Deployment:
        small_model(tmp_path)
        both = Server("both", prefill=("p",), decode=("d",))
        made = Deployment(model=str(tmp_path), servers=(both,))
        assert model(made) == ""
        return made

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_file_that_is_missing(
        self, deployment: Deployment, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / name).unlink()
        assert str(tmp_path) in model(deployment)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_file_that_may_not_be_read(
        self, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """The read is made to fail, since the tests may run as root, who may read everything."""
        really = Path.open

        def refused(self: Path, *args: Any, **options: Any) -> Any:
            if self.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return really(self, *args, **options)

        monkeypatch.setattr(Path, "open", refused)
        monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())
        assert model(deployment) == f"{tmp_path / name}: Permission denied"

    @pytest.mark.parametrize("data", [b"", b"version https://git-lfs", b"\x40" + b"\0" * 9])
    def test_weights_that_are_not_whole(
        self, deployment: Deployment, tmp_path: Path, data: bytes
    ) -> None:
        (tmp_path / "model.safetensors").write_bytes(data)
        found = model(deployment)
        assert found.startswith(f"{tmp_path / 'model.safetensors'} holds no whole safetensors")

    def test_a_shard_that_is_missing(self, deployment: Deployment, tmp_path: Path) -> None:
        index = {"weight_map": {"weight": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert model(deployment) == f"{tmp_path / 'model-1.safetensors'}: No such file or directory"

    def test_an_empty_folder_and_none(self, deployment: Deployment, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name, reason in (("empty", "config.json"), ("none", "is not there")):
            one = msgspec.structs.replace(deployment, model=str(tmp_path / name))
            assert reason in model(one)

    @pytest.mark.parametrize(
        "names",
        [
            {"model_type": "bloom", "n_head": 3},
            {"model_type": "falcon", "alibi": True},
            {"model_type": "mpt", "attn_config": {"alibi": True}},
        ],
    )
    def test_position_biases_are_the_reason(
        self, deployment: Deployment, tmp_path: Path, names: dict[str, Any]
    ) -> None:
        """The reason is not the missing context length, which such a model does not need."""
        (tmp_path / "config.json").write_text(json.dumps(names))
        assert f"a {names['model_type']} model with position biases (ALiBi)" in model(deployment)
        with pytest.raises(DeploymentError, match=r"position biases \(ALiBi\)"):
            context_length(deployment)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            {"text_config": {"rope_scaling": {"rope_type": "dynamic"}}},
        ],
    )
    def test_a_rotary_embedding_that_is_not_served(
        self, deployment: Deployment, tmp_path: Path, rope: dict[str, Any]
    ) -> None:
        """The engine refuses it by the same function when it loads the model."""
        (tmp_path / "config.json").write_text(json.dumps(rope))
        assert model(deployment) == f"{tmp_path}: rotary embedding of type dynamic is not served"

    def test_a_rotary_embedding_that_is_served(
        self, deployment: Deployment, tmp_path: Path
    ) -> None:
        names = {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}
        (tmp_path / "config.json").write_text(json.dumps(names))
        assert model(deployment) == ""

    def test_a_file_that_is_no_gguf(self, deployment: Deployment, tmp_path: Path) -> None:
        one = msgspec.structs.replace(deployment, model=str(tmp_path / "config.json"))
        assert "no GGUF" in model(one)

    @pytest.mark.parametrize(
        ("ranks", "reason"),
        [
            ((2, 3), "prefill tensor_parallel 2 and decode tensor_parallel 3"),
            ((2, 2), "prefill tensor_parallel 2: 3 KV heads cannot be shared out evenly"),
            ((3, 1), ""),
        ],
    )
    def test_ranks(self, deployment: Deployment, ranks: tuple[int, int], reason: str) -> None:
        n, m = ranks
        one = msgspec.structs.replace(
            deployment, prefill=Prefill(tensor_parallel=n), decode=Decode(tensor_parallel=m)
        )
        assert model(one).startswith(reason)
        assert bool(model(one)) == bool(reason)

    def test_a_profile_that_is_missing(self, deployment: Deployment, tmp_path: Path) -> None:
        engine = Engine(kind="emulated", profile=str(tmp_path / "profile.yaml"))
        one = msgspec.structs.replace(deployment, engine=engine)
        assert "profile.yaml: No such file" in model(one)


class TestHere:
    """The real probe on the machine of the tests."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        http, grpc, metrics = free_ports(3)
        server = {"name": "doctored", "prefill": ["p"], "decode": ["d"]}
        ports = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics}
        small_model(tmp_path)
        deployment = {
            "model": str(tmp_path),
            "servers": [server | ports],
            "prefill": {"arena_mib": 1},
        }
        file = tmp_path / "deployment.yaml"
        file.write_text(json.dumps(deployment))
        return file

    def test_json_is_an_examination(self, file: Path) -> None:
        done = CliRunner().invoke(cli.app, ["doctor", "--file", str(file), "--json"])
        assert done.exit_code == 0, done.output
        found = msgspec.json.decode(done.output, type=Examination)
        assert found.inventory.unknown == {}
        assert found.inventory.system.shm_mib > 0
        assert found.conclusion.served
        assert not found.conclusion.transports["shm"]

    def test_one_screen_and_status_3_for_what_cannot_be_served(self, file: Path) -> None:
        done = CliRunner().invoke(cli.app, ["doctor", "--file", str(file)])
        assert done.exit_code == 0
        assert "deployment.yaml can be served here: torch on the CPU." in done.output
        # The report lists what is there: no model at all, so nothing can be served.
        wanted = json.loads(file.read_text()) | {"model": "none", "engine": {"device": "cuda:99"}}
        file.write_text(json.dumps(wanted))
        done = CliRunner().invoke(cli.app, ["doctor", "--file", str(file)])
        assert done.exit_code == 3
        assert "the deployment wants number 99" in " ".join(done.output.split())

    @pytest.mark.parametrize(
        ("command", "wanted", "said"),
        [
            ("up", {"model": "none"}, "model: {folder}/none is not there"),
            (
                "up",
                {"engine": {"kind": "emulated", "profile": "none"}},
                "{folder}/none: No such file",
            ),
            ("up", {"prefill": {"tensor_parallel": 2}}, "3 KV heads cannot be shared out evenly"),
            ("serve", {"engine": {"device": "cuda:99"}}, "the deployment wants number 99"),
            ("demo", {"prefill": {"arena_mib": 1 << 30}}, "/dev/shm"),
        ],
    )
    def test_what_doctor_finds_is_not_started(
        self, file: Path, command: str, wanted: dict[str, Any], said: str
    ) -> None:
        """Each cause is printed once, in the doctor's words, and nothing is left behind."""
        file.write_text(json.dumps(json.loads(file.read_text()) | wanted))
        done = CliRunner().invoke(cli.app, ["doctor", "--json", "--file", str(file)])
        assert done.exit_code == 3
        found = msgspec.json.decode(done.output, type=Examination).findings
        problems = {one.about for one in found if one.state == "problem"}
        with pytest.raises(DeploymentError) as told:
            CliRunner().invoke(cli.app, [command, "--file", str(file)], catch_exceptions=False)
        assert said.format(folder=file.parent) in str(told.value)
        lines = str(told.value).splitlines()
        assert {line.partition(": ")[0] for line in lines} <= problems
        assert len(lines) == len(set(lines))
        assert not (paths.RUN / "doctored").exists()

    def test_whatever_fails_is_not_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command, "TIMEOUT_S", 0.001)
        written(tmp_path, {"proc/driver/nvidia/version": OPEN_MODULE})
        monkeypatch.setenv("PATH", str(tmp_path))
        deployment = Deployment(model="m", servers=(Server("far", host="192.0.2.7"),))
        found = probe(deployment, tmp_path)
        assert {"GPUs", "system", "process", "CMA"} <= set(found.unknown)
        assert "has not answered" in found.unknown["CMA"]
        assert found.gpus == ()
        assert msgspec.json.decode(msgspec.json.encode(found), type=Inventory) == found

    def test_the_network_of_the_deployment_is_that_of_its_servers(self) -> None:
        network = Network(devices=("lo",), gid_index=3)
        deployment = Deployment(
            model="m",
            servers=(Server("far", host="192.0.2.7"),),
            transfer=Transfer(network=network),
        )
        found = probe(deployment)
        assert found.process.environment["UCX_IB_GID_INDEX"] == "3"
        if found.ucx is not None:
            tcp = [name for name in found.ucx.transports if name.startswith("tcp/")]
            assert tcp == ["tcp/lo"]
