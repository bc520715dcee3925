"""The store of a deployment: opened as its section ``control`` says, and claimed for it alone."""

# ruff: noqa: PLC0415 - aetcd is an extra, and needed by few deployments

from __future__ import annotations

import hmac
from pathlib import Path

import msgspec

from pdserve.config import Control
from pdserve.control import records
from pdserve.control.records import Identity
from pdserve.control.store.file.store import FileStore
from pdserve.control.store.protocol import Compare, Put, Store
from pdserve.errors import DeploymentError


def folder(control: Control, run: Path) -> Path:
    """Return the folder of a store in a file; no server can have its name.

    Args:
        run: the folder with the servers' folders.
    """
    return run / f"control-{control.id}"


async def opened(control: Control, run: Path) -> Store:
    """Open the store of a deployment; one in etcd need not answer yet.

    Args:
        run: the folder with the servers' folders.

    Raises:
        StoreError: a store in a file cannot be opened.
        DeploymentError: etcd's settings do not go together, or its client is not installed.
    """
    if control.etcd is None:
        return await FileStore.opened(folder(control, run))
    from pdserve.control.store.etcd.client import EtcdAddress
    from pdserve.control.store.etcd.store import EtcdStore

    given = control.etcd

    def path(name: str | None) -> Path | None:
        return Path(name) if name else None

    address = EtcdAddress(
        given.endpoints,
        ca=path(given.ca),
        certificate=path(given.certificate),
        key=path(given.key),
        user=given.user,
        password_file=path(given.password_file),
    )
    return EtcdStore(address, control.id)


def identity(control: Control, key: bytes) -> Identity:
    """Return what a deployment is known by in its store: its id, and a fingerprint of its key."""
    return Identity(control.id, hmac.digest(key, b"pdserve store", "sha256")[:8].hex())


async def claim(store: Store, own: Identity) -> None:
    """Make sure that the store is this deployment's; a new one becomes so.

    Raises:
        DeploymentError: it is another one's; the message names both.
        StoreError: it cannot be told.
    """
    free = Compare(records.IDENTITY, "create_revision", 0)
    if await store.transact((free,), (Put(records.IDENTITY, records.encode(own)),)) is not None:
        return
    found = await store.list_prefix(records.CONTROL)
    values = {entry.key: entry.value for entry in found.entries}
    try:
        other = records.decode(values.get(records.IDENTITY, b""), Identity)
    except msgspec.MsgspecError as error:
        raise DeploymentError(
            f"key {records.IDENTITY} of the store does not say whose it is: {error}"
        ) from error
    if other != own:
        raise DeploymentError(
            f"the store belongs to the deployment {other.id} with the key {other.key}, and not to "
            f"{own.id} with the key {own.key}: give this one another control.id, or its former "
            "key_file; a store that nobody needs can be removed"
        )
