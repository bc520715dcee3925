"""A file in /dev/shm with KV caches in it, and the words by which two processes agree on them.

    page 0          header: magic, version, lease slots, epoch, data bytes
    from page 1     lease table, 64 bytes a slot
    page aligned    data

A slot has words of two writers, each of which writes only its own:

    holder      nonce (zero: no lease), expires
    receiver    state, and the nonce of the lease that it is about

The receiver's words count only while their nonce is the holder's: so a slot becomes idle again
with its next nonce, and what a late receiver says about an earlier lease is ignored. Every word
is written before, and read after, the nonce that gives it its meaning; this leans on the store
order of x86-64, and elsewhere on the many instructions between two steps of an interpreter.
"""

from __future__ import annotations

import mmap
import os
import re
from enum import IntEnum
from hmac import compare_digest
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

import numpy as np

from pdserve.errors import DeploymentError, HandleError
from pdserve.kvcache.handle import EPOCH_BYTES, NONCE_BYTES, REGION

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHM = Path("/dev/shm")  # noqa: S108 - where shm_open puts them, too

_PAGE = mmap.ALLOCATIONGRANULARITY
_MAGIC = b"PDSERVKV"
_VERSION = 1
_HEADER = Struct(f"<8sII{EPOCH_BYTES}sQ")

_SLOT_BYTES = 64
_NO_NONCE = bytes(NONCE_BYTES)
_NONCE = Struct(f"{NONCE_BYTES}s")
_EXPIRES = Struct("<d")
_STATE = Struct("<I")
# Offsets in a slot.
_HOLDER_NONCE, _HOLDER_EXPIRES = 0, 16
_RECEIVER_NONCE, _RECEIVER_STATE = 32, 48


class Pull(IntEnum):
    """What the receiver does with a lease."""

    IDLE = 0
    PULLING = 1
    DONE = 2


class SharedRegion:
    """`data` uint8 [data_bytes] under a name in shared memory, with a lease table.

    Writable for the process that created it; read-only, except for the receiver's words, for
    one that opened it.
    """

    def __init__(self, name: str, fd: int, *, writable: bool) -> None:
        status = os.fstat(fd)
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise HandleError(f"region {name} is no KV region: {status.st_size} bytes")
        magic, version, slots, _, data_bytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise HandleError(f"region {name} is no KV region: it begins with {magic!r}")
        if version != _VERSION:
            raise HandleError(f"region {name} has version {version}; this is version {_VERSION}")
        start = _data_start(slots)
        if status.st_size < start + data_bytes:
            raise HandleError(
                f"region {name} is cut short: {status.st_size} of {start + data_bytes} bytes"
            )
        self.name = name
        self.slots: int = slots
        self._inode = status.st_dev, status.st_ino
        self._words = mmap.mmap(fd, start, mmap.MAP_SHARED)
        # The holder pays for its page tables once, while its model loads (0.35 s/GiB), and not
        # in the first requests. A receiver does not: mmap keeps the GIL, 0.1 s/GiB in which its
        # decode would stand still; faults inside a copy cost it 1.5 x the copy, once per page.
        if writable:
            data = mmap.mmap(fd, data_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=start)
        else:
            data = mmap.mmap(fd, data_bytes, mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
        self.data: NDArray[np.uint8] = np.frombuffer(data, np.uint8)

    @classmethod
    def create(cls, name: str, data_bytes: int, lease_slots: int, epoch: bytes) -> SharedRegion:
        """Make a region and reserve all its memory.

        Raises:
            DeploymentError: the name is taken or not allowed, or there is not enough memory.
        """
        if not re.match(REGION, name):
            raise DeploymentError(f"region name {name!r} does not match {REGION}")
        path = SHM / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeploymentError(
                f"{path}: {error.strerror}; a region is created once per name, by its holder"
            ) from error
        size = _data_start(lease_slots) + data_bytes
        try:
            # Without this, a full file system would show as SIGBUS at some later write.
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, lease_slots, epoch, data_bytes), 0)
            return cls(name, fd, writable=True)
        except OSError as error:
            path.unlink()
            free = os.statvfs(SHM)
            raise DeploymentError(
                f"{path}: {error.strerror}: {size / 2**20:.1f} MiB wanted, "
                f"{free.f_bavail * free.f_frsize / 2**20:.1f} MiB available in {SHM}; "
                "lower prefill.arena_mib or enlarge it"
            ) from error
        finally:
            os.close(fd)

    @classmethod
    def open(cls, name: str) -> SharedRegion:
        """Map a region that another process holds.

        Raises:
            HandleError: there is none, or it is of another kind or version.
        """
        try:
            fd = os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise HandleError(f"region {name}: {error.strerror}; has its holder ended?") from error
        try:
            return cls(name, fd, writable=False)
        except OSError as error:
            raise HandleError(f"region {name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    @property
    def epoch(self) -> bytes:
        """Of the holder's life, as it stands in the header now."""
        epoch: bytes = _HEADER.unpack_from(self._words)[3]
        return epoch

    def named(self) -> bool:
        """Whether the name still leads here: not removed, nor taken by a later region."""
        try:
            status = (SHM / self.name).stat()
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def unlink(self) -> None:
        """Remove the name. Mappings, this one and others, stay until they are closed."""
        if self.named():
            (SHM / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap. Arrays made from `data` stay good: the memory goes with the last of them."""
        # Closing the map itself would raise BufferError while there are such arrays.
        self.data = np.empty(0, np.uint8)
        self._words.close()

    # The holder's words.

    def grant(self, slot: int, nonce: bytes, expires: float) -> None:
        """Put a lease into a slot; `expires` in seconds on CLOCK_MONOTONIC."""
        self._write(_EXPIRES, slot, _HOLDER_EXPIRES, expires)
        self._write(_NONCE, slot, _HOLDER_NONCE, nonce)

    def revoke(self, slot: int) -> None:
        """End a slot's lease. Done before anything else, so that a receiver notices."""
        self._write(_NONCE, slot, _HOLDER_NONCE, _NO_NONCE)

    def holds(self, slot: int, nonce: bytes) -> bool:
        """Whether the slot's lease is on and is the one of this nonce."""
        found: bytes = self._read(_NONCE, slot, _HOLDER_NONCE)
        return compare_digest(found, nonce) and nonce != _NO_NONCE

    def expires(self, slot: int) -> float:
        """When the slot's lease ends, in seconds on CLOCK_MONOTONIC."""
        expires: float = self._read(_EXPIRES, slot, _HOLDER_EXPIRES)
        return expires

    # The receiver's words.

    def begin(self, slot: int, nonce: bytes) -> None:
        """Say that the KV cache of a lease is being read."""
        self._write(_STATE, slot, _RECEIVER_STATE, Pull.PULLING)
        self._write(_NONCE, slot, _RECEIVER_NONCE, nonce)

    def finish(self, slot: int, nonce: bytes) -> None:
        """Say that it will not be read any more, unless the slot has gone to another lease."""
        if self.pull(slot, nonce) is Pull.PULLING:
            self._write(_STATE, slot, _RECEIVER_STATE, Pull.DONE)

    def pull(self, slot: int, nonce: bytes) -> Pull:
        """What the receiver does with the lease of this nonce."""
        if self._read(_NONCE, slot, _RECEIVER_NONCE) != nonce:
            return Pull.IDLE
        return Pull.DONE if self._read(_STATE, slot, _RECEIVER_STATE) == Pull.DONE else Pull.PULLING

    def _read(self, word: Struct, slot: int, offset: int) -> Any:
        return word.unpack_from(self._words, _PAGE + slot * _SLOT_BYTES + offset)[0]

    def _write(self, word: Struct, slot: int, offset: int, value: Any) -> None:
        word.pack_into(self._words, _PAGE + slot * _SLOT_BYTES + offset, value)


def _data_start(slots: int) -> int:
    return _PAGE + -(-slots * _SLOT_BYTES // _PAGE) * _PAGE
