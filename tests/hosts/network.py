"""Several hosts imitated on one machine by Linux namespaces on one network; needs root.

    root namespace    bridge, NETWORK.1 ── a veth for each host ── eth0, NETWORK.2, .3, ...

A host has its own network, host name, /dev/shm, boot id and CLOCK_MONOTONIC, so that nothing but
its network leads to another, and a time of one host means nothing on another. Processes, files and
the wall clock are shared. UCX tells hosts by their boot id: with one for all it would pick CMA
(64 MiB in 6 ms) between any two namespaces; so it picks tcp/eth0, and needs no variable for that.

Everything made here has a name that begins with its owner's process id, so that what an owner left
that was killed is found and removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import random
import re
import secrets
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import TypeVar

T = TypeVar("T")

COMMAND_S = 10.0
COMMANDS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
"""Commands that are used, and the package of each."""
MOST = 16
"""Hosts in one network."""
MAC = "02:00:00:00:00:01"
"""MAC address of the bridge."""
CLOCK_S = 1_000_000
"""Seconds by which the clock of each host is ahead of that of the one before."""
NETNS = Path("/run/netns")
LINKS = Path("/sys/class/net")
# Six digits hold every process id (at most 2**22); a link's name may have 15 characters.
_OURS = re.compile(r"(pds([0-9a-f]{6})[0-9a-f]{4})(br|h[0-9a-f]|-\w+)")
# A tbf cuts up what is larger than its burst, and veth passes on 64 KiB of segments at once. Twice
# that is also what goes over 1 Gbit/s in 1 ms, as late as a timer may be. Measured, one TCP stream
# of cubic, reno or bbr: 48, 191 and 956 Mbit/s of payload at 50, 200 and 1000, which is all that
# headers leave; with 32 KiB 900 of 1000. Without a limit: 19 Gbit/s.
_BURST = 128 << 10
# What a queue holds before it drops; a stream fills it, and whatever comes next waits so long.
_QUEUE_MS = 5
# The first process of a host: makes it, tells its id, and keeps it alive.
_FIRST = """
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
echo "$2" > /dev/shm/boot_id
mount --bind /dev/shm/boot_id /proc/sys/kernel/random/boot_id
rm /dev/shm/boot_id
echo $$
exec sleep infinity
"""


class NetworkError(Exception):
    """The machine refused a part of the network; the message has the command and its output."""


class Network:
    """Hosts by name, in one network with the root namespace; made by `hosts`. Not thread-safe."""

    def __init__(self, prefix: str, names: Sequence[str]) -> None:
        if len(names) > MOST:
            raise ValueError(f"{len(names)} hosts; at most {MOST}")
        addresses = map(str, _unused_network().hosts())
        self.gateway = next(addresses)
        """IPv4 address of the root namespace in this network."""
        self._prefix = prefix
        self._ports = {name: f"{prefix}h{number:x}" for number, name in enumerate(names)}
        self._addresses = {name: next(addresses) for name in names}
        self._first: dict[str, subprocess.Popen[str]] = {}
        self._pids: dict[str, int] = {}

    def address(self, host: str) -> str:
        """Return the IPv4 address of a host."""
        return self._addresses[host]

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """Return a command that runs ``argv`` on a host, in the folder `hosts` was called in."""
        pid = self._pids[host]
        options = ("--net", "--mount", "--uts", "--time", "--wd")
        return ["nsenter", f"--target={pid}", *options, "--", *argv]

    def call(self, host: str, function: Callable[[], T]) -> T:
        """Call ``function`` in a thread in a host's network, so its sockets are the host's."""

        def inside() -> T:
            libc = ctypes.CDLL(None, use_errno=True)
            with (NETNS / self._namespace(host)).open() as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise NetworkError(f"setns: {os.strerror(ctypes.get_errno())}")
            return function()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result()

    def set_rate(self, host: str, mbit: float | None) -> None:
        """Limit a host's link, in each direction, to ``mbit`` (10^6 bit/s); None: no limit."""
        limit = "noqueue"
        if mbit is not None:
            limit = f"tbf rate {mbit}mbit burst {_BURST} latency {_QUEUE_MS}ms"
        _do(f"tc qdisc replace dev {self._ports[host]} root {limit}")
        _do(f"tc -n {self._namespace(host)} qdisc replace dev eth0 root {limit}")

    def cut(self, host: str) -> None:
        """Cut a host off: whatever is sent to it, or by it, is lost, and nobody is told.

        What TCP has under way, 1 Gbit/s, goes on by itself when it next sends again, which is up
        to as long after ``restore`` as the cut has lasted (0.2 s: at once, 1 s: 0.5 s, 10 s: 7 s).
        A connection that only waits is ended by UCX's keepalive after 18 s.
        """
        _do(f"ip link set {self._ports[host]} nomaster")

    def restore(self, host: str) -> None:
        """Undo ``cut``."""
        _do(f"ip link set {self._ports[host]} master {self._prefix}br")

    def make(self) -> None:
        """Make it. Raises NetworkError; parts that exist by then stay until ``remove``."""
        bridge = f"{self._prefix}br"
        # With an address of its own, not one of a port's; without a delay, in which a port that has
        # just been added would forward nothing.
        _do(f"ip link add {bridge} address {MAC} type bridge forward_delay 0")
        _do(f"ip link set {bridge} addrgenmode none")  # no IPv6
        _do(f"ip addr add {self.gateway}/24 dev {bridge}")
        _do(f"ip link set {bridge} up")
        for number, (name, port) in enumerate(self._ports.items()):
            namespace = self._namespace(name)
            _do(f"ip netns add {namespace}")
            _do(f"ip link add {port} type veth peer name eth0 netns {namespace}")
            _do(f"ip link set {port} addrgenmode none master {bridge} up")
            _do(f"ip -n {namespace} addr add {self.address(name)}/24 dev eth0")
            _do(f"ip -n {namespace} link set eth0 addrgenmode none up")
            _do(f"ip -n {namespace} link set lo up")
            self._begin(name, (number + 1) * CLOCK_S)

    def _begin(self, host: str, clock_s: int) -> None:
        namespaces = ["ip", "netns", "exec", self._namespace(host)]  # network, and /sys of it
        namespaces += ["unshare", "--uts", "--time", f"--monotonic={clock_s}", "--fork"]
        first = subprocess.Popen(
            [*namespaces, "sh", "-ec", _FIRST, "sh", host, str(uuid.uuid4())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the owner
        )
        assert first.stdout is not None
        with first.stdout as output:
            said = output.readline().strip()
        self._first[host] = first
        if not said.isdigit():
            first.wait(COMMAND_S)
            raise NetworkError(f"host {host}: {said}")
        self._pids[host] = int(said)

    def remove(self) -> None:
        """Remove all of it, and kill all processes there."""
        for host, pid in self._pids.items():
            os.kill(pid, signal.SIGKILL)
            self._first[host].wait(COMMAND_S)
        _remove([self._prefix])

    def _namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"


@contextlib.contextmanager
def hosts(names: Sequence[str], rate_mbit: float | None = None) -> Iterator[Network]:
    """Make hosts; at the end whatever runs on them is killed.

    Args:
        names: of letters, digits and _.
        rate_mbit: see `Network.set_rate`.

    Raises:
        NetworkError: not possible here; see also `available`.
    """
    _remove(_stale())
    network = Network(f"pds{os.getpid():06x}{secrets.token_hex(2)}", names)
    try:
        network.make()
        for name in names if rate_mbit is not None else ():
            network.set_rate(name, rate_mbit)
        yield network
    finally:
        network.remove()


def available() -> str | None:
    """Return why hosts cannot be made here; None: they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for command, package in COMMANDS.items():
        if which(command) is None:
            return f"network namespaces need {command}, of the package {package}"
    try:
        with hosts(["probe"], rate_mbit=1000):
            return None
    except NetworkError as error:
        return str(error)


def leftovers() -> list[str]:
    """Return namespaces and links made by this module in any process, and not removed."""
    folders = [folder for folder in (NETNS, LINKS) if folder.exists()]
    names = [entry.name for folder in folders for entry in folder.iterdir()]
    return sorted(name for name in names if _OURS.fullmatch(name))


def _stale() -> set[str]:
    """Return the prefixes of owners that have ended."""
    found = [match for match in map(_OURS.fullmatch, leftovers()) if match]
    return {match[1] for match in found if not Path("/proc", str(int(match[2], 16))).exists()}


def _remove(prefixes: Collection[str]) -> None:
    # The links first: a namespace takes its own with it, but some time later.
    for name in sorted(leftovers(), key=lambda name: "-" in name):
        if not name.startswith(tuple(prefixes)):
            continue
        with contextlib.suppress(NetworkError):  # it may just have gone by itself
            if "-" in name:
                _kill_all(name)
                _do(f"ip netns del {name}")
            else:
                _do(f"ip link del {name}")


def _kill_all(namespace: str) -> None:
    """Kill the processes in a namespace, which would keep it alive."""
    deadline = time.monotonic() + COMMAND_S
    while (pids := _do(f"ip netns pids {namespace}").split()) and time.monotonic() < deadline:
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _unused_network() -> ipaddress.IPv4Network:
    """Return a /24 of 10.0.0.0/8 to which the root namespace has only a default route."""
    routes = json.loads(_do("ip -json -4 route show table all"))
    used = [ipaddress.ip_network(route["dst"]) for route in routes if route["dst"] != "default"]
    for _ in range(100):
        found = ipaddress.IPv4Network((random.getrandbits(16) << 8 | 10 << 24, 24))
        if not any(map(found.overlaps, used)):
            return found
    raise NetworkError("10.0.0.0/8 is in use")


def _do(command: str) -> str:
    done = subprocess.run(
        command.split(), check=False, capture_output=True, text=True, timeout=COMMAND_S
    )
    if done.returncode:
        raise NetworkError(f"{command}: {done.stderr.strip()}")
    return done.stdout
