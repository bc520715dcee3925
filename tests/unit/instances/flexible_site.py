"""Three instances in one loop: a prefill and a decode that stay so, and one that changes roles."""

from __future__ import annotations

import asyncio
import itertools
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from pdserve import config
from pdserve.control.assignment import ANY, FIRST, Assignment
from pdserve.instances.assigned import Assigned
from pdserve.instances.protocol import DecodeRole, PrefillRole
from pdserve.instances.role_factory import RoleFactory
from pdserve.node.role_switch import RoleSwitch, Switched
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import (
    Accepted,
    Connect,
    Connected,
    DecodeRequest,
    Describe,
    Described,
    NotConnected,
    Prefilled,
    PrefillRequest,
    Reply,
    Tokens,
    Transferred,
)
from pdserve.sampling import Sampling
from pdserve.transfer import key

if TYPE_CHECKING:
    from typing_extensions import Self

FIXED = {"prefill_0": "prefill", "decode_0": "decode"}
NAME = "flexible_0"
REPLY_S = 20.0
NEW = 6
"""Tokens of an answer."""


def deployment(folder: Path, model: Path, engine: config.Engine, **sections: Any) -> Any:
    """Return a deployment whose arena and pool have about 64 MiB each."""
    server = config.Server(
        "local", prefill=("prefill_0",), decode=("decode_0", NAME), flexible=(NAME,)
    )
    return config.Deployment(
        model=str(model),
        servers=(server,),
        engine=engine,
        transfer=config.Transfer(key_file=str(folder / "kv.key"), staging_mib=8),
        **sections,
    )


class Direct:
    """A channel to an instance of the same loop, whose messages are encoded as on the wire."""

    def __init__(self, instance: Assigned, number: int) -> None:
        self._instance, self._number = instance, number
        self._calls = Calls()

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = self._calls.open(call)
        data = messages.encode(request)
        asyncio.get_running_loop().call_soon(self._arrive, call, data)
        return replies

    def _arrive(self, call: str, data: bytes) -> None:
        def send(reply: Reply, _last: bool) -> None:
            self._calls.deliver(call, messages.encode_replies([(call, reply)]))

        self._instance.handle(self._number, messages.decode_request(data), "stream", send)

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    def lose(self, epoch: bytes) -> None:
        self._calls.lost(epoch)

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class One:
    """An instance as its Triton model makes it."""

    def __init__(self, name: str, kind: Any, role: Any, wanted: config.Deployment) -> None:
        self.metrics = Registry()
        self.factory = RoleFactory(name, wanted, key.of(wanted), self.metrics, role)
        self.kept: list[Assignment] = []
        make = self._make if kind == "flexible" else None
        self.assigned = Assigned(
            name,
            kind,
            Assignment(FIRST, role),
            self.factory.make(role),
            os.urandom(8),
            self.kept.append,
            make,
        )

    async def _make(self, assignment: Assignment) -> PrefillRole | DecodeRole | None:
        make = partial(self.factory.make, assignment.role)
        return await asyncio.get_running_loop().run_in_executor(None, make)

    def gauges(self) -> set[str]:
        """Return the gauges that are published now, by name and state."""
        changes = [one for one in self.metrics.drain() if one.kind == "gauge"]
        return {f"{one.name} {dict(one.labels).get('state', '')}".strip() for one in changes}


class FlexibleSite:
    """`async with` starts and closes the instances."""

    def __init__(self, wanted: config.Deployment) -> None:
        self.all = {name: One(name, kind, kind, wanted) for name, kind in FIXED.items()}
        self.flexible = self.all[NAME] = One(NAME, "flexible", "decode", wanted)
        self._ids = map(str, itertools.count())

    async def __aenter__(self) -> Self:
        for one in self.all.values():
            one.assigned.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in self.all.values():
            await one.assigned.close()
            await one.factory.close()

    def channel(self, name: str) -> Direct:
        return Direct(self.all[name].assigned, ANY)

    async def switch(self, role: Any, within_s: float = 10.0) -> Switched:
        number = self.flexible.assigned.assignment.number + 1
        decodes = [name for name in self.all if name != "prefill_0"]
        switch = RoleSwitch(NAME, self.channel, decodes, within_s)
        return await switch.run(Assignment(number, role))

    async def ask(self, name: str, request: messages.Request) -> Reply:
        """Return the first reply that is no acceptance."""
        return await _heard(self._open(name, request))

    def _open(self, name: str, request: messages.Request) -> Replies:
        assigned = self.all[name].assigned
        return Direct(assigned, assigned.assignment.number).open(request.id, request)

    async def connect(self, prefill: str, decode: str) -> None:
        described = await self.ask(prefill, Describe(next(self._ids)))
        assert isinstance(described, Described), described
        connected = await self.ask(decode, Connect(next(self._ids), described.endpoint))
        assert isinstance(connected, Connected), connected

    def prompt(self, prompt: bytes, **fields: Any) -> PrefillRequest:
        return PrefillRequest(next(self._ids), prompt, Sampling(), "t", 60_000, **fields)

    async def prefilled(self, prefill: str, prompt: bytes, **fields: Any) -> tuple[str, Prefilled]:
        request = self.prompt(prompt, **fields)
        reply = await self.ask(prefill, request)
        assert isinstance(reply, Prefilled), reply
        return request.id, reply

    async def serve(self, prefill: str, decode: str, prompt: bytes) -> list[int]:
        """Return the tokens of an answer."""
        call, first = await self.prefilled(prefill, prompt)
        found = await self.decoded(first, prompt, decode)
        if found is None:
            await self.connect(prefill, decode)
            found = await self.decoded(first, prompt, decode)
        assert found is not None
        if first.unseen:
            await self.ask(prefill, Transferred(call))
        return found

    async def decoded(self, first: Prefilled, prompt: bytes, decode: str) -> list[int] | None:
        """Return the tokens of an answer; None: the decode is not connected to its prefill."""
        asked = DecodeRequest(
            next(self._ids), prompt, first.token, first.handle, Sampling(), "t", NEW, True, 1e6
        )
        replies, ids = self._open(decode, asked), b""
        while not isinstance(reply := await _heard(replies), NotConnected):
            assert isinstance(reply, Tokens), reply
            ids += reply.ids
            if reply.finish_reason:
                assert reply.finish_reason == "length"
                return [first.token, *np.frombuffer(ids, "<i4").tolist()]
        return None


async def _heard(replies: Replies) -> Reply:
    while isinstance(reply := await replies.get(REPLY_S), Accepted):
        pass
    return reply


def shared() -> int:
    """Return the bytes in /dev/shm of arenas of the flexible instance."""
    files = Path("/dev/shm").glob(f"pdserve-{NAME.replace('_', '-')}-*")
    return sum(file.stat().st_blocks * 512 for file in files)


def held() -> dict[str, int]:
    """Return what this process holds: memory in bytes, descriptors, threads, mapped arenas."""
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "shm": shared(),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "arenas": Path("/proc/self/maps").read_text().count(f"pdserve-{NAME.replace('_', '-')}-"),
    }


def reset_peak() -> None:
    """Let `peak` begin anew, at the memory that is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the largest resident memory in bytes since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10
