"""Channels from an agent to the instances of a deployment."""

from __future__ import annotations

import asyncio

from pdctl.watched_server import WatchedServer
from pdserve.control.assignment import ANY, FIRST
from pdserve.errors import InstanceError
from pdserve.node.assignments import Assignments
from pdserve.rpc.channels.grpc import GrpcChannel


class Channels:
    """Channels to any instance of the deployment, made on request.

    Args:
        assignments: the present ones; a channel to a former one is closed when it is asked for.
    """

    def __init__(self, watched: WatchedServer, assignments: Assignments) -> None:
        self._tended = watched
        self._assignments = assignments
        self._made: dict[str, tuple[int, GrpcChannel]] = {}
        self._any: dict[str, GrpcChannel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __call__(self, instance: str) -> GrpcChannel:
        """Return the channel to an instance under its present assignment."""
        assignment = self._assignments.of(instance)
        number = FIRST if assignment is None else assignment.number
        address = self._address(instance)
        name = f"{address}/{instance}"
        if name not in self._made or self._made[name][0] != number:
            if name in self._made:
                self._close(self._made[name][1])
            channel = GrpcChannel(address, instance, self._tended.key, number)
            self._made[name] = (number, channel)
        return self._made[name][1]

    def whatever(self, instance: str) -> GrpcChannel:
        """Return the channel to an instance for what goes to it under any assignment."""
        address = self._address(instance)
        name = f"{address}/{instance}"
        if name not in self._any:
            self._any[name] = GrpcChannel(address, instance, self._tended.key, ANY)
        return self._any[name]

    def once(self, instance: str) -> GrpcChannel:
        """Return one like `whatever`, which the caller closes."""
        return GrpcChannel(self._address(instance), instance, self._tended.key, ANY)

    def drop(self, instance: str) -> None:
        """Close the channels to an instance: a stream keeps the process of its model."""
        for name in [one for one in self._made if one.endswith(f"/{instance}")]:
            self._close(self._made.pop(name)[1])
        for name in [one for one in self._any if one.endswith(f"/{instance}")]:
            self._close(self._any.pop(name))

    def _close(self, channel: GrpcChannel) -> None:
        closing = asyncio.create_task(channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _address(self, instance: str) -> str:
        """Raises InstanceError: the instance no longer exists."""
        if instance in self._tended.models:  # whatever the deployment says of it now
            return self._tended.server.grpc
        deployment = self._tended.deployment
        server = (deployment.instances("prefill") | deployment.instances("decode")).get(instance)
        if server is None:
            raise InstanceError(f"{instance} is not in the deployment any more")
        return f"{server.host}:{server.grpc_port}"

    async def close(self) -> None:
        """Close all of them."""
        made = [*(channel for _, channel in self._made.values()), *self._any.values()]
        await asyncio.gather(*(channel.close() for channel in made), *self._closing)
