"""Finds RDMA devices in the kernel's /sys/class/infiniband."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pdctl.doctor.inventory import Gid, RDMAPort

_EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


def ports(root: Path) -> tuple[RDMAPort, ...]:
    """The ports of every device."""
    found = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    return tuple(_port(root, folder) for folder in found)


def _port(root: Path, folder: Path) -> RDMAPort:
    device = folder.parents[1]
    nodes = (device / "device/infiniband_verbs").glob("uverbs*")
    return RDMAPort(
        device=device.name,
        port=int(folder.name),
        # "4: ACTIVE"
        state=_read(folder / "state").partition(": ")[2],
        link_layer=_read(folder / "link_layer"),
        rate=_read(folder / "rate"),
        gids=tuple(_gids(folder)),
        accessible=any(
            os.access(root / "dev/infiniband" / node.name, os.R_OK | os.W_OK) for node in nodes
        ),
    )


def _gids(folder: Path) -> Iterator[Gid]:
    for file in sorted((folder / "gids").iterdir(), key=lambda file: int(file.name)):
        gid = _read(file)
        if gid and gid != _EMPTY:
            attributes = folder / "gid_attrs"
            yield Gid(
                index=int(file.name),
                gid=gid,
                kind=_read(attributes / "types" / file.name),
                netdev=_read(attributes / "ndevs" / file.name),
            )


def _read(file: Path) -> str:
    """Return the file's text; empty where the kernel answers EINVAL, for rows without a netdev."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
