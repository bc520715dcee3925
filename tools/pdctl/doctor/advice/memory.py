"""Findings about shared memory, limits, and the isolation of processes from each other."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from pdctl.doctor.advice.finding import Finding
from pdctl.doctor.advice.needs import Needs
from pdctl.doctor.inventory import Inventory, Process

SHM = "/dev/shm"  # noqa: S108 - where POSIX shared memory lies
FILES = 4096
"""The maximum of requests in a gateway's wait queue, each of which has a connection."""
START_FILES = 96
"""With fewer, a server of eight models does not start: idle, it has 72 to 76 open."""


def memory(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    if "system" not in inventory.unknown:
        yield from _shm(inventory, needs)
    if "process" not in inventory.unknown:
        yield from _limits(inventory.process)
        yield from _container(inventory.process)
    if "CMA" not in inventory.unknown:
        yield _cma(inventory, needs)


def _shm(inventory: Inventory, needs: Needs) -> Iterator[Finding]:
    system, wanted = inventory.system, needs.shm_mib
    lacks = wanted > system.shm_free_mib
    gib = ceil((system.shm_mib - system.shm_free_mib + wanted) / 1024)
    enlarged = (
        f"--shm-size={gib}g"
        if inventory.process.container
        else f"mount -o remount,size={gib}g /dev/shm"
    )
    yield Finding(
        about=SHM,
        state="problem" if lacks else "ok",
        found=f"{system.shm_free_mib:,} of {system.shm_mib:,} MiB free; {wanted:,} needed",
        used=""
        if lacks
        else "shm"
        if "shm" in needs.transports and not needs.gpus
        else "Triton's own",
        unused="shm: arenas do not fit" if lacks else "",
        mend=f"{enlarged}; or a smaller prefill.arena_mib" if lacks else "",
    )
    if wanted > system.available_mib:
        yield Finding(
            about="memory",
            state="problem",
            found=f"{system.available_mib:,} of {system.memory_mib:,} MiB available; arenas and "
            f"Triton take {wanted:,}, the model comes on top",
            mend="a smaller prefill.arena_mib; or more memory (container: --memory)",
        )


def _limits(process: Process) -> Iterator[Finding]:
    files, locked = process.nofile, process.memlock_kib
    few = files is not None and files < FILES
    none = files is not None and files < START_FILES
    said = "any" if locked is None or "IPC_LOCK" in process.capabilities else f"{locked:,} KiB"
    yield Finding(
        about="limits",
        state="problem" if none else "note" if few else "ok",
        found=f"open files: {'any' if files is None else f'{files:,}'}; locked memory: {said}",
        unused=f"servers cannot start: each needs {START_FILES} open files and more"
        if none
        else f"a gateway's full wait queue, {FILES:,} requests"
        if few
        else "",
        mend="a higher hard limit, ulimit -Hn 65536 (container: --ulimit nofile=65536)"
        if few
        else "",
    )


def _container(process: Process) -> Iterator[Finding]:
    if process.private:
        kinds = " and ".join(process.private)
        yield Finding(
            about="container",
            state="note",
            found=f"{process.container or 'namespaces'}: {kinds} of its own",
            used="shm and cuda_ipc within this container",
            unused="shm and cuda_ipc with instances in other containers of this host",
            mend="one container for all of them; or --ipc=host --pid=host",
        )
    elif process.container:
        yield Finding(
            about="container",
            state="ok",
            found=f"{process.container}, in the machine's IPC and PID namespaces",
            used="memory shared with every instance of this host",
        )


def _cma(inventory: Inventory, needs: Needs) -> Finding:
    process = inventory.process
    used = needs.near and "nixl" in needs.transports
    if not inventory.cma:
        return Finding(
            about="CMA",
            state="ok",
            found="process_vm_readv works between processes of this user",
            used="nixl within this host" if used else "",
            unused="" if used else "nixl: the deployment does without",
        )
    if process.ptrace_scope > 1 and "SYS_PTRACE" not in process.capabilities:
        mend = "sysctl kernel.yama.ptrace_scope=1"
    elif process.container:
        mend = "--cap-add=SYS_PTRACE" + (", or another seccomp profile" if process.seccomp else "")
    else:
        mend = "let what forbids process_vm_readv (seccomp, SELinux, another user) allow it"
    return Finding(
        about="CMA",
        state="note" if used else "missing",
        found=f"process_vm_readv between two processes: {inventory.cma}",
        unused="nixl over CMA, within this host",
        mend=mend,
    )
