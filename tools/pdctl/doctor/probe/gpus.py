"""Finds GPUs by nvidia-smi, which comes with every driver, so that NVML is no dependency."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from pdctl.doctor.inventory import GPU, Direct, GPUNic, GPUPair, Topology
from pdctl.doctor.probe.command import Unknown, answer

_FIELDS = "index,uuid,name,driver_version,memory.total,compute_mode,mig.mode.current"
_UNDERLINE = re.compile(r"\x1b\[\d*m")
_DEVICE = re.compile(r"(GPU|NIC)\d+")
_NIC = re.compile(r"^\s*(NIC\d+): (\S+)", re.MULTILINE)
_PEERMEM = {"nvidia_peermem", "nv_peer_mem"}
_DRIVER = "proc/driver/nvidia/version"


def gpus(root: Path) -> tuple[GPU, ...]:
    """Return the GPUs. Raises Unknown: there is a driver, but it lists none."""
    if shutil.which("nvidia-smi") is None:
        if (root / _DRIVER).exists():
            raise Unknown("there is a driver, but no nvidia-smi")
        return ()
    return listed(answer("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"))


def listed(table: str) -> tuple[GPU, ...]:
    """Return the rows of nvidia-smi's query for _FIELDS."""
    found = []
    for line in table.splitlines():
        index, uuid, name, driver, memory, mode, mig = (cell.strip() for cell in line.split(","))
        found.append(
            GPU(
                index=int(index),
                uuid=uuid,
                name=name,
                driver=driver,
                # "[N/A]" where the GPU has no memory of its own.
                memory_mib=int(memory) if memory.isdigit() else 0,
                compute_mode=mode,
                mig=mig == "Enabled",
            )
        )
    return tuple(found)


def topology(devices: Iterable[GPU]) -> Topology:
    """Return the topology. Raises Unknown: nvidia-smi prints none."""
    names = [(gpu.index, f"GPU{gpu.index}") for gpu in devices]
    if not names:
        return Topology()
    drawn = answer("nvidia-smi", "topo", "-m")
    paths, peers = matrix(drawn), matrix(answer("nvidia-smi", "topo", "-p2p", "r"))
    return Topology(
        pairs=tuple(
            GPUPair(
                first=first,
                second=second,
                path=paths.get((name, other), ""),
                peer=peers.get((name, other), ""),
            )
            for first, name in names
            for second, other in names
            if first < second
        ),
        nics=tuple(
            GPUNic(gpu=index, device=device, path=paths[name, nic])
            for index, name in names
            for nic, device in _NIC.findall(drawn)
            if (name, nic) in paths
        ),
    )


def matrix(table: str) -> dict[tuple[str, str], str]:
    """Return the cells of the matrix of ``nvidia-smi topo``, by the names of row and column."""
    rows = (line.split() for line in _UNDERLINE.sub("", table).splitlines())
    head = next((row for row in rows if row[:1] == ["GPU0"]), [])
    columns = list(filter(_DEVICE.fullmatch, head))
    return {
        (row[0], column): cell
        for row in rows
        if row and row[0] in columns
        for column, cell in zip(columns, row[1:], strict=False)
    }


def direct(root: Path) -> Direct:
    driver, modules = root / _DRIVER, root / "proc/modules"
    # A kernel without loadable modules has no list of them.
    loaded = modules.read_text().splitlines() if modules.exists() else []
    return Direct(
        peermem=any(line.split()[0] in _PEERMEM for line in loaded),
        open_module=driver.exists() and "Open Kernel Module" in driver.read_text(),
    )
