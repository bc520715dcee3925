#!/usr/bin/env bash
# NIXL 1.5.1 (nixl-cu12) with UCX: an agent that talks to nobody listens on every network.
#
# Who is affected: everybody who runs NIXL on a machine with more than loopback, be it for transfers
# inside that machine alone, and has to know what listens there: who shares the network with others,
# or lets only known ports through.
# What happens: an agent with the UCX backend opens a listening TCP socket on the IPv4 address of each
# interface that is up, at a port of the kernel's choice. It does so although `enable_listen_thread`
# is False (this flag concerns NIXL's exchange of metadata alone) and although no peer was ever named.
# To leave TCP out is no remedy: with UCX_TLS=shm,self the backend is not made, and NIXL raises
# NIXL_ERR_BACKEND.
# What to do: set UCX_NET_DEVICES before the agent is made: `lo` for transfers inside one host, the
# name of the network meant for transfers between hosts.
#
# Seen on a machine with lo and eth0:
#   default:            listens on eth0, lo
#   UCX_NET_DEVICES=lo: listens on lo
#   UCX_TLS=shm,self:   nixlBackendError NIXL_ERR_BACKEND
#
# Exit status: 0 while this is so, another as soon as it is not. A machine that has loopback alone
# cannot tell: the script says so, and ends with 0.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
python=$work/venv/bin/python
timeout 900 "$python" -m pip install --quiet --no-deps nixl-cu12==1.5.1 numpy==2.2.6 psutil==7.2.2

# One agent in a process of its own; prints the interfaces on whose addresses it listens.
cat >"$work/agent.py" <<'AGENT'
import socket

import psutil
from nixl_cu12 import nixl_agent, nixl_agent_config

try:
    agent = nixl_agent("alone", nixl_agent_config(enable_listen_thread=False, backends=["UCX"]))
except Exception as error:
    print("RESULT", type(error).__name__, error)
else:
    owner = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
    own = psutil.Process().net_connections(kind="tcp4")
    names = {owner.get(c.laddr.ip, c.laddr.ip) for c in own if c.status == psutil.CONN_LISTEN}
    print("RESULT", *sorted(names))
AGENT

timeout 300 "$python" - "$work/agent.py" <<'CHECK'
import os
import socket
import subprocess
import sys

import psutil


def agent(**settings):
    """The last line of an agent's process, with no other UCX setting than these."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, sys.argv[1]],
        env=clean | settings, capture_output=True, text=True, timeout=90, check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not results:
        sys.exit(f"the agent's process ended with {done.returncode}: {done.stderr[-2000:]}")
    return results[-1].removeprefix("RESULT").strip()


up = {name for name, state in psutil.net_if_stats().items() if state.isup}
networks = {
    name
    for name, addresses in psutil.net_if_addrs().items()
    if name in up and any(a.family == socket.AF_INET for a in addresses)
    and os.path.exists(f"/sys/class/net/{name}")  # UCX finds interfaces there
}
beyond = {name for name in networks if name != "lo"}
if "lo" not in networks or not beyond:
    print(f"skipped: only these interfaces are up with IPv4, which cannot tell: {sorted(networks)}")
    sys.exit(0)

default = set(agent().split())
loopback = agent(UCX_NET_DEVICES="lo")
without_tcp = agent(UCX_TLS="shm,self")
print("default:           ", "listens on", ", ".join(sorted(default)))
print("UCX_NET_DEVICES=lo:", "listens on", loopback)
print("UCX_TLS=shm,self:  ", without_tcp)

if not (default & beyond and loopback == "lo" and "NIXL_ERR_BACKEND" in without_tcp):
    sys.exit("CHANGED: this is no longer what the finding says")
print("unchanged: an agent that talks to nobody listens beyond loopback")
CHECK
