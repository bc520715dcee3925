"""Reads which libraries an ELF file needs, by its dynamic section.

The layout is that of the System V ABI (gABI, chapters 4 and 5), for 64-bit little-endian files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16s2HI3QI6H")
_SEGMENT = struct.Struct("<2I6Q")
_ENTRY = struct.Struct("<2Q")
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB = 1, 5


def needed(data: bytes) -> list[str]:
    """Return the names of the libraries (DT_NEEDED) that a file names, in order.

    Raises:
        ValueError: it is not a 64-bit little-endian ELF file, or is damaged.
    """
    if data[:6] != MAGIC + b"\2\1":
        raise ValueError("no 64-bit little-endian ELF file")
    try:
        segments = list(_segments(data))
        entries = [
            entry for kind, *at in segments if kind == _DYNAMIC for entry in _dynamic(data, *at)
        ]
        names = [value for tag, value in entries if tag == _NEEDED]
        if not names:
            return []
        (address,) = (value for tag, value in entries if tag == _STRTAB)
        (table,) = (
            offset + address - start
            for kind, offset, start, size in segments
            if kind == _LOAD and start <= address < start + size
        )
    except struct.error as error:
        raise ValueError(f"damaged: {error}") from error
    return [_text(data, table + name) for name in names]


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the kind, file offset, address and bytes of each segment."""
    _, _, _, _, _, offset, _, _, _, size, count, *_ = _HEADER.unpack_from(data)
    for number in range(count):
        kind, _, start, address, _, nbytes, _, _ = _SEGMENT.unpack_from(
            data, offset + number * size
        )
        yield kind, start, address, nbytes


def _dynamic(data: bytes, offset: int, _: int, nbytes: int) -> Iterator[tuple[int, int]]:
    yield from _ENTRY.iter_unpack(data[offset : offset + nbytes])


def _text(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()
