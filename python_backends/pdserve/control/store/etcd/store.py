"""The store in etcd.

Every call has a time limit of its own, since neither gRPC nor aetcd has one by default. After a
call that failed for want of an answer the connection is closed, the watches on it end, and the next
call connects to the next endpoint: a watch alone does not notice that its server is stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import aetcd
from aetcd import rpc

from pdserve.control.store.errors import Compacted, LeaseLost, Refused, StoreUnreachable
from pdserve.control.store.etcd.client import EtcdAddress, EtcdClient
from pdserve.control.store.keys import check_key, check_prefix, check_transaction, is_key
from pdserve.control.store.protocol import (
    Compare,
    Delete,
    Entry,
    KeyChange,
    Lease,
    Listing,
    Put,
)

CALL_S = 5.0
"""Seconds that a call may take, connecting included."""

T = TypeVar("T")
_Code = rpc.StatusCode
_NO_ANSWER = None, _Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED, _Code.CANCELLED, _Code.INTERNAL
# The last one is how gRPC says that a call on which something is written has ended.
_ERRORS = aetcd.ClientError, rpc.AioRpcError, rpc.BaseError, asyncio.InvalidStateError


class EtcdStore:
    """A `Store` in an etcd cluster.

    A lease ends when it has not been kept alive for its time, by etcd's clock.

    Args:
        deployment: its keys begin with "/pdserve/<deployment>/"; others are not touched.
        call_s: see `CALL_S`.
    """

    def __init__(self, address: EtcdAddress, deployment: str, call_s: float = CALL_S) -> None:
        if "/" in deployment:
            raise Refused(f"deployment {deployment!r}: a slash is not allowed")
        self._root = f"/pdserve/{check_key(deployment)}/".encode()
        self._address = address
        self._call_s = call_s
        self._connections = 0
        self._client = self._new_client()
        self._closing: set[asyncio.Task[None]] = set()

    def _new_client(self) -> EtcdClient:
        client = EtcdClient(self._address, self._connections, self._call_s)
        self._connections += 1
        return client

    async def list_prefix(self, prefix: str) -> Listing:
        """See `Store.list_prefix`. Keys that no store would take are left out."""
        found = await self._call(
            f"listing {prefix!r}",
            lambda client: client.get_prefix(self._key(check_prefix(prefix)), sort_order="ascend"),
        )
        entries = (
            Entry(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)
            for kv in found.kvs
            if is_key(key := self._name(kv.key))
        )
        return Listing(found.header.revision, tuple(entries))

    async def watch_prefix(self, prefix: str, revision: int) -> AsyncIterator[KeyChange]:
        """See `Store.watch_prefix`.

        This uses etcd's stream and not aetcd's watcher, which does not tell its users of a stream
        that ends without an error, nor of a watch that etcd cancels. It begins one revision
        earlier: etcd 3.5.1 accepts a watch from exactly the revision up to which it has compacted,
        and leaves out the deletions at that revision.
        """
        start = self._key(check_prefix(prefix))
        what = f"watching {prefix!r} from revision {revision}"

        async def begin(client: EtcdClient) -> tuple[EtcdClient, Any]:
            await client.connect()
            call = rpc.WatchStub(client.channel).Watch(metadata=client.metadata)
            request = rpc.WatchCreateRequest(
                key=start, range_end=_range_end(start), start_revision=max(1, revision - 1)
            )
            await call.write(rpc.WatchRequest(create_request=request))
            return client, call

        client, call = await self._call(what, begin)
        limit_s: float | None = self._call_s
        try:
            while True:
                reply = await self._read(what, client, call, limit_s)
                limit_s = None  # etcd has said that it watches; there may be nothing for any time
                if reply.compact_revision:
                    raise Compacted(f"etcd: {what}: compacted up to {reply.compact_revision}")
                if reply.canceled:
                    raise Refused(f"etcd: {what}: {reply.cancel_reason or 'cancelled'}")
                for event in reply.events:
                    key = self._name(event.kv.key)
                    if event.kv.mod_revision >= revision and is_key(key):
                        kind: Literal["PUT", "DELETE"] = "DELETE" if event.type else "PUT"
                        yield KeyChange(kind, key, event.kv.mod_revision, event.kv.value)
        finally:
            call.cancel()

    async def transact(
        self, compare: Sequence[Compare], operations: Sequence[Put | Delete]
    ) -> int | None:
        """See `Store.transact`."""
        check_transaction(compare, operations)
        request = rpc.TxnRequest(
            compare=[self._condition(one) for one in compare],
            success=[self._operation(one) for one in operations],
        )
        first = operations[0].key if operations else compare[0].key if compare else ""

        async def work(client: EtcdClient) -> rpc.TxnResponse:
            await client.connect()
            return await client.kvstub.Txn(request, metadata=client.metadata)

        reply = await self._call(f"a transaction that begins with key {first!r}", work)
        return reply.header.revision if reply.succeeded else None

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store.grant`; etcd rounds up to seconds, and to its own minimum (2 s mostly)."""
        lease = await self._call("granting a lease", lambda client: client.lease(-int(-ttl_s // 1)))
        return Lease(lease.id, float(lease.ttl))

    async def keep_alive(self, lease: int) -> None:
        """See `Store.keep_alive`."""
        what = f"keeping lease {lease:x} alive"
        reply = await self._call(what, lambda client: client.refresh_lease(lease))
        if reply is None:
            raise StoreUnreachable(f"etcd: {what}: no answer")
        if reply.TTL <= 0:  # how etcd says that there is no such lease
            raise LeaseLost(f"etcd: lease {lease:x} has ended")

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""

        async def work(client: EtcdClient) -> None:
            try:
                await client.revoke_lease(lease)
            except aetcd.ClientError as error:
                if _code(error) is not _Code.NOT_FOUND:
                    raise

        await self._call(f"revoking lease {lease:x}", work)

    async def close(self) -> None:
        """See `Store.close`; leases last for the rest of their time."""
        await self._client.close()
        await asyncio.gather(*self._closing)

    async def _call(self, what: str, work: Callable[[EtcdClient], Awaitable[T]]) -> T:
        """Do something on a connection within the time of a call.

        It is done once more if etcd does not know this client's token, as after a restart.

        Raises:
            StoreUnreachable, Refused, LeaseLost: with what was to be done.
        """
        client = self._client
        clock = asyncio.get_running_loop()
        until = clock.time() + self._call_s
        for again in True, False:
            task = asyncio.ensure_future(work(client))
            try:
                await asyncio.wait((task,), timeout=until - clock.time())
            finally:
                task.cancel()
            if not task.done() or task.cancelled():
                self._give_up(client)
                raise StoreUnreachable(
                    f"etcd: {what}: no answer from {client.endpoint} within {self._call_s} s"
                )
            if (error := task.exception()) is None:
                return task.result()
            if not (again and _token_is_old(error)):
                self._fail(what, client, error)
            client = self._give_up(client)
        raise AssertionError("the second time returns or raises")

    def _fail(self, what: str, client: EtcdClient, error: BaseException) -> NoReturn:
        if not isinstance(error, _ERRORS):
            raise error
        code = _code(error)
        text = f"etcd: {what}, at {client.endpoint}: {error_text(error)}"
        if code is _Code.NOT_FOUND and "lease" in text:
            raise LeaseLost(text) from error
        if code in _NO_ANSWER:
            self._give_up(client)
            raise StoreUnreachable(text) from error
        raise Refused(text) from error

    async def _read(
        self, what: str, client: EtcdClient, call: Any, limit_s: float | None
    ) -> rpc.WatchResponse:
        """Return the next message of a watch."""
        task = asyncio.ensure_future(call.read())
        try:
            await asyncio.wait((task,), timeout=limit_s)
        finally:
            task.cancel()
        if not task.done():
            self._give_up(client)
            raise StoreUnreachable(
                f"etcd: {what}: no answer from {client.endpoint} within {limit_s} s"
            )
        if task.cancelled():  # by `_give_up`, on account of another call
            raise StoreUnreachable(
                f"etcd: {what}: the connection to {client.endpoint} was given up"
            )
        if (error := task.exception()) is not None:
            self._fail(what, client, error)
        if not isinstance(reply := task.result(), rpc.WatchResponse):
            raise StoreUnreachable(f"etcd: {what}: {client.endpoint} has ended it")
        return reply

    def _give_up(self, client: EtcdClient) -> EtcdClient:
        """Have all calls use another connection from now on; returns it."""
        if client is self._client:
            self._client = self._new_client()
            task = asyncio.ensure_future(client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return self._client

    def _key(self, key: str) -> bytes:
        return self._root + key.encode()

    def _name(self, key: bytes) -> str:
        return key[len(self._root) :].decode(errors="replace")

    def _condition(self, one: Compare) -> rpc.Compare:
        target = {"create_revision": "CREATE", "mod_revision": "MOD", "value": "VALUE"}[one.field]
        return rpc.Compare(
            key=self._key(one.key),
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.CompareTarget.Value(target),
            **{one.field: one.equals},
        )

    def _operation(self, one: Put | Delete) -> rpc.RequestOp:
        key = self._key(one.key)
        if isinstance(one, Put):
            put = rpc.PutRequest(key=key, value=one.value, lease=one.lease)
            return rpc.RequestOp(request_put=put)
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))


def _range_end(prefix: bytes) -> bytes:
    """Return the end of the range of keys with a prefix, whose last byte is a slash."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def _code(error: BaseException) -> rpc.StatusCode | None:
    """Return gRPC's code; aetcd keeps it only in the cause of its own error."""
    while not isinstance(error, rpc.AioRpcError):
        if error.__cause__ is None:
            return None
        error = error.__cause__
    return error.code()


def error_text(error: BaseException) -> str:
    """Return what etcd says of an error."""
    return (error.details() if isinstance(error, rpc.AioRpcError) else str(error)) or repr(error)


def _token_is_old(error: BaseException) -> bool:
    return _code(error) is _Code.UNAUTHENTICATED or "auth store is old" in error_text(error)
