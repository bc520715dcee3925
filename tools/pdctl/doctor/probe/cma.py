"""Tests in a separate process whether a process may read another's memory (CMA)."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys

from pdctl.doctor.probe.command import answer

_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)
WORD = b"there"
_HELD_S = 5


class _Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def cma() -> str:
    """Return why CMA is not allowed; empty: it is. Raises Unknown: it could not be tried."""
    return answer(sys.executable, "-m", __name__).strip()


def main() -> None:
    """Run two children: a parent may read its child where siblings may not read each other."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = ctypes.create_string_buffer(len(WORD))
    written, writing = os.pipe()
    holder = os.fork()
    if not holder:
        signal.alarm(_HELD_S)  # ended in any case when its parent ends
        # like UCX, for Yama's ptrace_scope 1
        libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
        memory.raw = WORD
        os.write(writing, b".")
        signal.pause()
    try:
        os.read(written, 1)
        reader = os.fork()
        if not reader:
            os._exit(read(libc, holder, memory))
        status = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    if status:
        print(os.strerror(status))


def read(libc: ctypes.CDLL, holder: int, memory: ctypes.Array[ctypes.c_char]) -> int:
    """Return an errno; 0: the holder's word has arrived."""
    local = _Range(ctypes.addressof(memory), len(WORD))
    remote = _Range(ctypes.addressof(memory), len(WORD))
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    got = libc.process_vm_readv(
        holder,
        *(ctypes.byref(local), ctypes.c_ulong(1)),
        *(ctypes.byref(remote), ctypes.c_ulong(1)),
        ctypes.c_ulong(0),
    )
    if got < 0:
        return ctypes.get_errno()
    return 0 if memory.raw == WORD else errno.EIO


if __name__ == "__main__":
    main()
