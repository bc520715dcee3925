"""Finds kernel, memory, limits and isolation in /proc and /sys."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Mapping
from pathlib import Path

from pdctl.doctor.inventory import Process, System
from pdctl.doctor.variables import VARIABLES

# Bits of CapEff, and the inode numbers of the namespaces that the machine starts with: both are
# the kernel's, the same everywhere (capability.h, proc_ns.h).
_CAPABILITIES = {14: "IPC_LOCK", 19: "SYS_PTRACE"}
_INITIAL = {"ipc": 0xEFFFFFFF, "pid": 0xEFFFFFFC}
_GROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def system(root: Path) -> System:
    lines = (root / "proc/meminfo").read_text().splitlines()
    memory = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines}
    limit = min((*_group_limits(root), memory["MemTotal"]))
    shm = root / "dev/shm"
    size = os.statvfs(shm) if shm.exists() else None
    return System(
        machine=platform.machine(),
        kernel=(root / "proc/sys/kernel/osrelease").read_text().strip(),
        memory_mib=limit,
        available_mib=min(memory["MemAvailable"], limit),
        shm_mib=size.f_blocks * size.f_frsize >> 20 if size else 0,
        shm_free_mib=size.f_bavail * size.f_frsize >> 20 if size else 0,
    )


def _group_limits(root: Path) -> list[int]:
    files = [root / "sys/fs/cgroup" / name for name in _GROUP_LIMITS]
    found = [file.read_text().strip() for file in files if file.exists()]
    return [int(limit) >> 20 for limit in found if limit.isdigit()]


def process(root: Path, environment: Mapping[str, str]) -> Process:
    lines = (root / "proc/self/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    effective = int(status["CapEff"], 16)
    scope = root / "proc/sys/kernel/yama/ptrace_scope"
    memlock, _ = _limits(resource.RLIMIT_MEMLOCK)
    _, files = _limits(resource.RLIMIT_NOFILE)
    return Process(
        nofile=files,
        memlock_kib=None if memlock is None else memlock >> 10,
        capabilities=tuple(name for bit, name in _CAPABILITIES.items() if effective >> bit & 1),
        seccomp=status.get("Seccomp", "0") != "0",
        ptrace_scope=int(scope.read_text()) if scope.exists() else 0,
        container=_container(root, environment),
        private=tuple(
            name
            for name, initial in _INITIAL.items()
            if str((root / "proc/self/ns" / name).readlink()) != f"{name}:[{initial}]"
        ),
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )


def _limits(which: int) -> list[int | None]:
    """Return soft and hard limit; None: there is none."""
    return [None if one == resource.RLIM_INFINITY else one for one in resource.getrlimit(which)]


def _container(root: Path, environment: Mapping[str, str]) -> str:
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    return "docker" if (root / ".dockerenv").exists() else ""
