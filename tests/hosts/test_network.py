"""Tests for imitated hosts: isolated, connected, rate-limited, cut off, and removed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import network as harness
from tests.hosts.network import CLOCK_S, Network, hosts, leftovers

pytestmark = [pytest.mark.hosts, pytest.mark.alone]

WAIT_S = 3.0
MEASURE_S = 1.0


def output(network: Network, host: str, script: str) -> str:
    command = network.command(host, ["sh", "-c", script])
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


@contextlib.contextmanager
def connected(network: Network, source: str, target: str) -> Iterator[tuple[socket.socket, ...]]:
    """Yield the two ends of a TCP connection from one host to another."""
    listening = network.call(target, lambda: socket.create_server((network.address(target), 0)))
    with listening:
        listening.settimeout(WAIT_S)
        address = listening.getsockname()
        sender = network.call(source, lambda: socket.create_connection(address, WAIT_S))
        receiver, _ = listening.accept()
    with sender, receiver:
        sender.settimeout(WAIT_S)
        receiver.settimeout(WAIT_S)
        yield sender, receiver


@contextlib.contextmanager
def flow(sender: socket.socket, receiver: socket.socket) -> Iterator[Callable[[float], float]]:
    """Send as much as possible; yield a function that measures Mbit/s over some seconds."""
    received = 0

    def send() -> None:
        data = bytes(1 << 18)
        with contextlib.suppress(OSError):
            while True:
                sender.sendall(data)

    def receive() -> None:
        nonlocal received
        buffer = bytearray(1 << 20)
        with contextlib.suppress(OSError):
            while size := receiver.recv_into(buffer):
                received += size

    def rate(seconds: float) -> float:
        before, began = received, time.perf_counter()
        time.sleep(seconds)
        return (received - before) * 8e-6 / (time.perf_counter() - began)

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.2)
        yield rate
    finally:
        for end in (sender, receiver):
            end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(WAIT_S)


class TestApart:
    def test_clocks(self, network: Network) -> None:
        script = f"exec {sys.executable} -c 'import time; print(time.monotonic())'"
        left, right = (float(output(network, host, script)) for host in ("left", "right"))
        assert left - time.monotonic() == pytest.approx(CLOCK_S, abs=60)
        assert right - left == pytest.approx(CLOCK_S, abs=60)

    @pytest.mark.parametrize("script", ["cat /proc/sys/kernel/random/boot_id", "hostname"])
    def test_identities(self, network: Network, script: str) -> None:
        here = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
        found = {here.stdout, *(output(network, host, script) for host in ("left", "right"))}
        assert len(found) == 3

    def test_shared_memory(self, network: Network) -> None:
        output(network, "left", "touch /dev/shm/pdserve-hosts-test")
        assert output(network, "left", "ls /dev/shm") == "pdserve-hosts-test\n"
        assert output(network, "right", "ls /dev/shm") == ""
        assert not Path("/dev/shm/pdserve-hosts-test").exists()

    def test_links(self, network: Network) -> None:
        for host in ("left", "right"):
            assert output(network, host, "ls /sys/class/net").split() == ["eth0", "lo"]

    def test_folder_is_that_of_the_owner(self, network: Network) -> None:
        assert output(network, "left", "pwd").strip() == str(Path.cwd())


class TestConnected:
    @pytest.mark.parametrize(("source", "target"), [("left", "right"), ("right", "left")])
    def test_hosts(self, network: Network, source: str, target: str) -> None:
        with connected(network, source, target) as (sender, receiver):
            assert receiver.getpeername()[0] == network.address(source)
            sender.sendall(b"from host to host")
            assert receiver.recv(64) == b"from host to host"

    def test_root_namespace(self, network: Network) -> None:
        address = network.address("left"), 0
        with network.call("left", lambda: socket.create_server(address)) as listening:
            address = listening.getsockname()
            with socket.create_connection(address, WAIT_S) as connection:
                assert connection.getsockname()[0] == network.gateway

    def test_loopback_of_a_host_is_its_own(self, network: Network) -> None:
        with network.call("left", lambda: socket.create_server(("127.0.0.1", 0))) as listening:
            address = listening.getsockname()
            network.call("left", lambda: socket.create_connection(address, WAIT_S)).close()
            with pytest.raises(ConnectionRefusedError):
                network.call("right", lambda: socket.create_connection(address, WAIT_S))


class TestRate:
    @pytest.mark.parametrize("mbit", [200, 1000])
    def test_in_both_directions(self, network: Network, mbit: int) -> None:
        network.set_rate("left", mbit)
        for ends in (("left", "right"), ("right", "left")):
            with connected(network, *ends) as connection, flow(*connection) as rate:
                # Other processes may have delayed one or two of them.
                found = [rate(MEASURE_S)]
                while found[-1] != pytest.approx(mbit, rel=0.15) and len(found) < 3:
                    found.append(rate(MEASURE_S))
                assert found[-1] == pytest.approx(mbit, rel=0.15), found

    def test_limit_is_taken_away(self, network: Network) -> None:
        network.set_rate("left", 200)
        with connected(network, "left", "right") as connection, flow(*connection) as rate:
            network.set_rate("left", None)
            time.sleep(0.2)
            assert rate(0.5) > 1000


class TestCut:
    def test_nothing_passes_until_it_is_restored(self, network: Network) -> None:
        with connected(network, "left", "right") as connection, flow(*connection) as rate:
            network.cut("left")
            time.sleep(0.1)
            assert rate(0.3) == 0
            network.restore("left")
            # TCP tries again 0.2, 0.4, 0.8 s after the attempt before.
            assert rate(1.0) > 100

    def test_others_are_not_cut_off(self, hosts_possible: None) -> None:
        with hosts(["a", "b", "c"]) as network:
            network.cut("a")
            with connected(network, "b", "c") as (sender, receiver):
                sender.sendall(b"x")
                assert receiver.recv(1) == b"x"
            with pytest.raises(TimeoutError):
                network.call("b", lambda: socket.create_connection((network.address("a"), 9), 0.3))


class TestRemoved:
    def test_with_what_runs_there(self, hosts_possible: None) -> None:
        with hosts(["left", "right"], rate_mbit=1000) as network:
            assert len(ours(os.getpid())) == 5
            command = network.command("left", ["sh", "-c", "echo begun; exec sleep 60"])
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        assert ours(os.getpid()) == []
        assert process.wait(WAIT_S) == -signal.SIGKILL
        process.stdout.close()

    def test_after_an_error(self, hosts_possible: None) -> None:
        with pytest.raises(ZeroDivisionError), hosts(["left"]):
            1 / 0  # noqa: B018
        assert ours(os.getpid()) == []

    def test_when_it_cannot_be_made(
        self, hosts_possible: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "_FIRST", "echo no such thing >&2; exit 1")
        expected = pytest.raises(harness.NetworkError, match="host left: no such thing")
        with expected, hosts(["left"]):
            pass
        assert ours(os.getpid()) == []

    def test_after_its_owner_was_killed(self, hosts_possible: None) -> None:
        script = (
            "import subprocess; from tests.hosts.network import hosts\n"
            "with hosts(['left', 'right']) as network:\n"
            "    subprocess.run(network.command('left', ['sh', '-c', 'echo $$; exec sleep 60']))\n"
        )
        owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
        owner.stdout.close()
        assert len(ours(owner.pid)) == 5
        with hosts(["left"]):
            assert ours(owner.pid) == []
        assert not running(child)


def test_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert harness.available() == "network namespaces need root"


def test_needs_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness.available() == "network namespaces need ip, of the package iproute2"


def ours(owner: int) -> list[str]:
    return [name for name in leftovers() if name.startswith(f"pds{owner:06x}")]


def running(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
