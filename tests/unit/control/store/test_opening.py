"""Tests for the store of a deployment: no two deployments share one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdserve.config import Control, Etcd
from pdserve.control import records, stores
from pdserve.control.store.protocol import put
from pdserve.errors import DeploymentError
from tests.unit.control.store.etcd_server import EtcdServer, in_loop, needs_etcd

KEY, OTHER_KEY = bytes(32), bytes(31) + b"1"


def test_a_store_goes_on_with_the_same_deployment_and_refuses_another(tmp_path: Path) -> None:
    async def run() -> None:
        control = Control("chat")
        first = await stores.opened(control, tmp_path)
        await stores.claim(first, stores.identity(control, KEY))
        await first.close()
        again = await stores.opened(control, tmp_path)
        await stores.claim(again, stores.identity(control, KEY))
        own = stores.identity(control, OTHER_KEY)
        named = f"belongs to the deployment chat .* not to chat with the key {own.key}"
        with pytest.raises(DeploymentError, match=named):
            await stores.claim(again, own)
        await again.close()
        other = await stores.opened(Control("code"), tmp_path)
        assert (await other.list_prefix("")).entries == ()
        await other.close()

    asyncio.run(run())


def test_a_damaged_identity_is_an_error_that_names_its_key(tmp_path: Path) -> None:
    async def run() -> None:
        control = Control("chat")
        store = await stores.opened(control, tmp_path)
        await put(store, records.IDENTITY, b"{")
        with pytest.raises(DeploymentError, match="control/identity"):
            await stores.claim(store, stores.identity(control, KEY))
        await store.close()

    asyncio.run(run())


@needs_etcd
def test_two_deployments_of_one_etcd_have_their_own_keys(shared_etcd: EtcdServer) -> None:
    @in_loop
    async def run() -> None:
        etcd = Etcd((shared_etcd.endpoint,))
        chat, code = Control("stores_chat", etcd), Control("stores_code", etcd)
        one = await stores.opened(chat, Path())
        other = await stores.opened(code, Path())
        await stores.claim(one, stores.identity(chat, KEY))
        await stores.claim(other, stores.identity(code, KEY))
        assert [entry.key for entry in (await one.list_prefix("")).entries] == [records.IDENTITY]
        with pytest.raises(DeploymentError, match=r"stores_chat .* stores_chat"):
            await stores.claim(one, stores.identity(chat, OTHER_KEY))
        await one.close()
        await other.close()

    run()
