"""aetcd's client with what it lacks: TLS, several endpoints, and an end to every wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aetcd
import grpc
from aetcd import rpc

from pdserve.control.store.errors import Refused
from pdserve.errors import DeploymentError

CONNECT_S = 2.0
"""Seconds for an endpoint to accept a connection; then the next one is tried."""
MAX_MESSAGE = 64 << 20
"""Bytes of a listing; gRPC's own bound is 4 MiB."""

_State = grpc.ChannelConnectivity
_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.min_reconnect_backoff_ms": int(CONNECT_S * 1000),  # in fact the limit of an attempt
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3000,
    "grpc.max_receive_message_length": MAX_MESSAGE,
    # A channel that was given up must not leave its pause before reconnecting to the next one.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
}


@dataclass(frozen=True)
class EtcdAddress:
    """How an etcd cluster is reached, and as whom.

    Attributes:
        endpoints: "host:port" of its members.
        ca, certificate, key: files in PEM format. With `ca` the connection uses TLS; the other two
            identify this client to a cluster that asks for it.
        user, password_file: if the cluster has authentication enabled. The file holds the password;
            a line's end is cut off.
    """

    endpoints: tuple[str, ...]
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password_file: Path | None = None

    def __post_init__(self) -> None:
        """Raises DeploymentError: fields do not go together."""
        if not self.endpoints:
            raise DeploymentError("etcd: there are no endpoints")
        if (self.certificate is None) != (self.key is None):
            raise DeploymentError("etcd: a certificate needs its key, and a key its certificate")
        if self.certificate and not self.ca:
            raise DeploymentError("etcd: a certificate is used with TLS only, which needs a ca")
        if bool(self.user) != bool(self.password_file):
            raise DeploymentError("etcd: a user needs a password_file, and it a user")
        if self.user and not self.ca:
            raise DeploymentError("etcd: a password is only sent with TLS, which needs a ca")

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return what TLS needs, or None without TLS; the files are read anew each time."""
        if self.ca is None:
            return None
        return grpc.ssl_channel_credentials(
            _read(self.ca),
            _read(self.key) if self.key else None,
            _read(self.certificate) if self.certificate else None,
        )

    def password(self) -> str:
        """Return the content of the password's file."""
        assert self.password_file is not None
        return _read(self.password_file).decode().rstrip("\r\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"etcd: {error}") from error


async def _ready(channel: rpc.Channel) -> None:
    """Return when a channel is connected.

    Raises:
        aetcd.ConnectionFailedError: it has failed to; gRPC itself would try again and again.
    """
    while (state := channel.get_state(try_to_connect=True)) is not _State.READY:
        if state is _State.TRANSIENT_FAILURE:
            raise aetcd.ConnectionFailedError("no connection")
        await channel.wait_for_state_change(state)


class EtcdClient(aetcd.Client):  # type: ignore[misc]
    """A connection to one member of a cluster, whichever answers first in turn.

    Attributes:
        endpoint: to which it is connected; before that, which are tried.
    """

    def __init__(self, address: EtcdAddress, first: int, timeout_s: float) -> None:
        super().__init__(timeout=timeout_s, options=_OPTIONS)
        self._address = address
        ends = address.endpoints
        self._order: Sequence[str] = [ends[(first + one) % len(ends)] for one in range(len(ends))]
        self._lock = asyncio.Lock()
        self.endpoint = ", ".join(self._order)

    async def connect(self) -> None:
        """Connect to the first endpoint that answers, unless that has been done.

        Raises:
            aetcd.ConnectionFailedError: none answers.
            aetcd.ClientError: the user may not log in.
        """
        async with self._lock:
            if self._connected.is_set():
                return
            credentials = self._address.credentials()
            reasons = []
            for endpoint in self._order:
                channel = (
                    rpc.insecure_channel(endpoint, options=[*_OPTIONS.items()])
                    if credentials is None
                    else rpc.secure_channel(endpoint, credentials, options=[*_OPTIONS.items()])
                )
                try:
                    await asyncio.wait_for(_ready(channel), CONNECT_S)
                    await self._log_in(channel)
                except (asyncio.TimeoutError, aetcd.ConnectionFailedError) as error:
                    reasons.append(f"{endpoint}: {error or f'no answer within {CONNECT_S} s'}")
                    await channel.close()
                except BaseException:
                    await channel.close()
                    raise
                else:
                    self._use(channel, endpoint)
                    return
            raise aetcd.ConnectionFailedError("; ".join(reasons))

    async def _log_in(self, channel: rpc.Channel) -> None:
        if not self._address.user:
            return
        request = rpc.AuthenticateRequest(
            name=self._address.user, password=self._address.password()
        )
        try:
            reply = await rpc.AuthStub(channel).Authenticate(request, timeout=CONNECT_S)
        except rpc.AioRpcError as error:
            if error.code() in (rpc.StatusCode.UNAVAILABLE, rpc.StatusCode.DEADLINE_EXCEEDED):
                raise aetcd.ConnectionFailedError(error.details()) from error
            raise Refused(f"etcd: user {self._address.user!r}: {error.details()}") from error
        self.metadata = (("token", reply.token),)

    def _use(self, channel: rpc.Channel, endpoint: str) -> None:
        self.channel = channel
        self.endpoint = endpoint
        self.kvstub = rpc.KVStub(channel)
        self.leasestub = rpc.LeaseStub(channel)
        self.clusterstub = rpc.ClusterStub(channel)
        self.maintenancestub = rpc.MaintenanceStub(channel)
        self._connected.set()

    async def close(self) -> None:
        """Close the connection; calls that are open on it are cancelled."""
        if self.channel is not None:
            await self.channel.close()
