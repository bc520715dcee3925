"""Channels from an agent to the instances of a deployment."""

from __future__ import annotations

import asyncio

from pdctl.watched_server import WatchedServer
from pdserve.errors import InstanceError
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.client import Channel


class Channels:
    """Channels to any instance of the deployment, made on request."""

    def __init__(self, watched: WatchedServer) -> None:
        self._tended = watched
        self._made: dict[str, GrpcChannel] = {}

    def __call__(self, instance: str) -> Channel:
        address = self._address(instance)
        name = f"{address}/{instance}"
        if name not in self._made:
            self._made[name] = GrpcChannel(address, instance, self._tended.key)
        return self._made[name]

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
        await asyncio.gather(*(channel.close() for channel in self._made.values()))
