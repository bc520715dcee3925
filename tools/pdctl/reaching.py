"""Whether an instance answers: this process itself, and the gateways."""

from __future__ import annotations

import asyncio
import uuid

import grpc

from pdctl import questions
from pdserve.config import Deployment, Server
from pdserve.control.assignment import ANY
from pdserve.errors import InstanceError
from pdserve.node import failure_notice
from pdserve.rpc.channels.grpc import GrpcChannel
from pdserve.rpc.messages import Inspect, Inspected

WITHIN_S = 2.0
"""Seconds for an answer."""
AT_ONCE = 16
"""Instances that are asked at the same time."""


class Reaching:
    """Asks instances, as long as no agent tells of them.

    Args:
        key: the deployment's key.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, deployment: Deployment, name: str) -> bool:
        """Tell whether an instance may live: False only if it answers neither us nor any gateway.

        If no gateway answers, nothing is known.
        """
        servers = deployment.instances("prefill") | deployment.instances("decode")
        if name not in servers:
            return True
        async with self._gate:
            if await self._answers(servers[name], name):
                return True
            gateways = [server for server in deployment.servers if server.gateway]
            found = await asyncio.gather(*(self._answers_to(one, name) for one in gateways))
        known = [answer for answer in found if answer is not None]
        return not known or any(known)

    async def _answers(self, server: Server, name: str) -> bool:
        """Tell whether an instance answers this process.

        The channel is closed afterwards, since a stream keeps a model that is being unloaded.
        """
        channel = GrpcChannel(_address(server), name, self._key, ANY)
        call = uuid.uuid4().hex
        try:
            return isinstance(await channel.open(call, Inspect(call)).get(WITHIN_S), Inspected)
        except InstanceError:
            return False
        finally:
            await channel.close()

    async def _answers_to(self, gateway: Server, name: str) -> bool | None:
        """Tell whether an instance answers a gateway; None: the gateway itself does not."""
        notice = failure_notice.encode(failure_notice.question(name), self._key)
        try:
            asking = questions.reached(_address(gateway), notice)
            return await asyncio.wait_for(asking, 2 * WITHIN_S)
        except (InstanceError, asyncio.TimeoutError, grpc.RpcError):
            return None


def _address(server: Server) -> str:
    return f"{server.host}:{server.grpc_port}"
