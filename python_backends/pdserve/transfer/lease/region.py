"""A file in /dev/shm with KV caches and their lease table.

page 0          header: magic, version, lease slots, epoch, data bytes
from page 1     lease table; what its words say: `pdserve.transfer.lease.words`
page aligned    data, if it is host memory
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np

from pdserve.errors import DeploymentError, HandleError
from pdserve.kvcache.handle import EPOCH_BYTES
from pdserve.transfer.lease.words import RECEIVER_WORD, SLOT_BYTES, Grant, pack_word

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHM = Path("/dev/shm")  # noqa: S108 - where shm_open puts them, too

# \Z, because $ would let a trailing newline through.
NAME = r"^pdserve-[a-z0-9-]{1,56}\Z"
_PAGE = mmap.ALLOCATIONGRANULARITY
_MAGIC = b"PDSERVKV"
_VERSION = 2
_HEADER = Struct(f"<8sII{EPOCH_BYTES}sQ")


class SharedRegion:
    """Shared memory with a name: `data` uint8 [data_bytes], and a lease table.

    `data` is writable for the process that created it, and read-only for one that opened it. Errors
    do not contain the name, since they reach clients.
    """

    def __init__(self, name: str, fd: int, *, writable: bool) -> None:
        status = os.fstat(fd)
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise HandleError(f"it is no KV region: {status.st_size} bytes")
        magic, version, slots, _, data_bytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise HandleError(f"it is no KV region: it begins with {magic!r}")
        if version != _VERSION:
            raise HandleError(f"the region has version {version}; this is version {_VERSION}")
        start = _data_start(slots)
        if status.st_size < start + data_bytes:
            raise HandleError(
                f"the region is cut short: {status.st_size} of {start + data_bytes} bytes"
            )
        self.name = name
        self.slots: int = slots
        self._inode = status.st_dev, status.st_ino
        self._words = memoryview(mmap.mmap(fd, start, mmap.MAP_SHARED))
        # The holder sets up its page tables once, while its model loads (0.35 s/GiB), and not in
        # the first requests. A receiver does not: mmap keeps the GIL, 0.1 s/GiB in which its decode
        # would stand still; faults during a copy cost it 1.5 x the copy, once per page.
        if not data_bytes:
            self.data: NDArray[np.uint8] = np.empty(0, np.uint8)
            return
        if writable:
            data = mmap.mmap(fd, data_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=start)
        else:
            data = mmap.mmap(fd, data_bytes, mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
        self.data = np.frombuffer(data, np.uint8)

    @classmethod
    def create(cls, name: str, data_bytes: int, lease_slots: int, epoch: bytes) -> SharedRegion:
        """Create a region and reserve all its memory.

        Raises:
            DeploymentError: the name is taken or not allowed, or there is not enough memory.
        """
        if not re.match(NAME, name):
            raise DeploymentError(f"region name {name!r} does not match {NAME}")
        path = SHM / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeploymentError(
                f"{path}: {error.strerror}; a region is created once per name, by its holder"
            ) from error
        size = _data_start(lease_slots) + data_bytes
        try:
            # Otherwise a full file system would cause SIGBUS at some later write.
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
            HandleError: there is none, or it has another kind or version.
        """
        try:
            fd = os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise HandleError(f"the region: {error.strerror}; has its holder ended?") from error
        try:
            return cls(name, fd, writable=False)
        except OSError as error:
            raise HandleError(f"the region cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    @property
    def epoch(self) -> bytes:
        """Return the epoch of the holder, as it stands in the header now."""
        epoch: bytes = _HEADER.unpack_from(self._words)[3]
        return epoch

    def named(self) -> bool:
        """Tell whether the name still belongs to this region, and not to a later one."""
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
        """Unmap. Arrays made from `data` stay valid: the memory is freed with the last of them."""
        # Closing the maps themselves would raise BufferError while such arrays exist.
        self.data = np.empty(0, np.uint8)
        self._words = memoryview(bytearray(_data_start(self.slots)))

    @property
    def table(self) -> NDArray[np.uint8]:
        """Return the lease table, uint8 [slots * SLOT_BYTES]."""
        return np.frombuffer(self._words, np.uint8)[_PAGE : _PAGE + self.slots * SLOT_BYTES]

    def grant(self, slot: int, grant: Grant) -> None:
        """Write the holder's words of a slot, the nonce last, since it makes them valid."""
        words = grant.pack()
        start = self._start(slot)
        nonce = len(grant.nonce)
        self._words[start + nonce : start + len(words)] = words[nonce:]
        self._words[start : start + nonce] = words[:nonce]

    def mark(self, slot: int, word: int) -> None:
        """Write the receiver's word of a slot."""
        packed = pack_word(word)
        start = self._start(slot) + RECEIVER_WORD
        self._words[start : start + len(packed)] = packed

    def peek(self, slot: int) -> bytes:
        """Return the SLOT_BYTES bytes of a slot."""
        start = self._start(slot)
        return bytes(self._words[start : start + SLOT_BYTES])

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise HandleError(f"lease slot {slot} of a table that has {self.slots}")
        return _PAGE + slot * SLOT_BYTES


def _data_start(slots: int) -> int:
    return _PAGE + -(-slots * SLOT_BYTES // _PAGE) * _PAGE
