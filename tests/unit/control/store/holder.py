"""A process that leads, or holds leased keys, until a test stops or kills it.

Run with a store's kind, its place and what to do: `lead` reads a line for each write that it is to
do, and prints its outcome; `hold` keeps a key.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pdserve.control.store.election import Candidate
from pdserve.control.store.errors import StoreError
from pdserve.control.store.file.store import FileStore
from pdserve.control.store.leased import LeasedKeys
from pdserve.control.store.protocol import Put, Store

TTL_S = 2.0


async def opened(kind: str, place: str) -> Store:
    """Return a store: etcd at an endpoint, or SQLite in a folder."""
    if kind == "file":
        return await FileStore.opened(Path(place))
    from pdserve.control.store.etcd.client import EtcdAddress
    from pdserve.control.store.etcd.store import EtcdStore

    return EtcdStore(EtcdAddress((place,)), "test")


async def lead(store: Store) -> None:
    leadership = await Candidate(store, "process", TTL_S).lead()
    keeping = asyncio.ensure_future(leadership.run())
    print("leads", flush=True)
    generation = await leadership.generation()
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            operations = [Put("desired", line.strip().encode())]
            generation = await leadership.write(generation, operations)
            print("written", flush=True)
        except StoreError as error:
            print(type(error).__name__, flush=True)
    keeping.cancel()


async def hold(store: Store) -> None:
    leased = LeasedKeys(store, TTL_S)
    leased.set("held", b"by a process")
    work = asyncio.ensure_future(leased.run())
    while not leased.written:
        await asyncio.sleep(0.01)
    print("holds", flush=True)
    await work


async def main(kind: str, place: str, what: str) -> None:
    """Open the store and do what is asked."""
    await (lead if what == "lead" else hold)(await opened(kind, place))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
