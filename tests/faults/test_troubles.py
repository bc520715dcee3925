"""Tests that a stub's death is repaired during other faults, and that no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from pdctl import fleet, keys, questions, watchers
from pdctl.server import Server
from pdctl.status import scrape
from pdserve import config
from pdserve.errors import InstanceError
from pdserve.node import epoch, failure_notice
from pdserve.transfer import key
from tests.clients import wait_until
from tests.faults.load import Load
from tests.faults.serving import (
    RELOADED_S,
    RESTARTED_S,
    STALL_S,
    all_in_one,
    leader,
    on_this_machine,
    repairs,
    said,
    stub,
    watched,
)
from tests.faults.test_repair import changed_code
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]

GAP_S = 0.8
"""The longest gap of a stream on free cores when the stub of its instance dies."""
LOAD_S = 1.5
SLOW_S = 8.0
"""Time to load a model, within which only a notice can have been received."""
ROOM_MIB = 8
SHIFTED = """
import time
now = time.time
time.time = lambda: now() + float({seconds})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A separate disk, which a test can fill."""
    path = tmp_path_factory.mktemp("disk")
    size = f"size={ROOM_MIB}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", path], check=False)
    if done.returncode:
        pytest.skip("a disk that can be full is a mount, and that is for root alone")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    whole = all_in_one(elsewhere)
    own_key = msgspec.structs.replace(whole.transfer, key_file=str(elsewhere / "kv.key"))
    with watched(msgspec.structs.replace(whole, transfer=own_key), folder) as started:
        yield started


@contextlib.contextmanager
def no_room(server: Running) -> Iterator[None]:
    """Fill the disk to the last byte, so that nothing can be written."""
    one = server.servers[0]
    ballast = one.folder.parent / "ballast"
    try:
        for _ in range(2):  # files that are replaced at this moment free some space again
            with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            before = (one.folder / "watch.json").stat().st_mtime
            time.sleep(1)
        yield
        assert (one.folder / "watch.json").stat().st_mtime - before < 1, "there was room left"
    finally:
        ballast.unlink()


@contextlib.contextmanager
def no_key(server: Running) -> Iterator[None]:
    path = Path(server.deployment.transfer.key_file)
    path.unlink()
    yield
    assert not path.exists(), "no other one has been made"
    key.copy(key.load(keys.copy(server.servers[0].folder)), path)


@contextlib.contextmanager
def open_key(server: Running) -> Iterator[None]:
    path = Path(server.deployment.transfer.key_file)
    path.chmod(0o644)
    yield
    path.chmod(0o600)


@contextlib.contextmanager
def fewer_instances(server: Running) -> Iterator[None]:
    """Remove an instance from the deployment by a reload; it runs on until a restart."""
    one = server.servers[0]
    file = one.repository / "deployment.yaml"
    before = file.read_bytes()
    deployment = config.load(file)
    (spec,) = deployment.servers
    fewer = msgspec.structs.replace(spec, prefill=spec.prefill[:1])
    changed = msgspec.structs.replace(deployment, servers=(fewer,))
    file.write_bytes(msgspec.yaml.encode(changed))
    time.sleep(3)  # every check has been made since
    yield
    file.write_bytes(before)
    time.sleep(1.5)  # applied


@contextlib.contextmanager
def another_clock(server: Running, seconds: float) -> Iterator[None]:
    """Move the watchdog's clock ahead or back by an hour, as that of another host may be."""
    one = server.servers[0]
    shift = one.folder.parent / "shift"
    shift.mkdir(exist_ok=True)
    (shift / "sitecustomize.py").write_text(SHIFTED.format(seconds=seconds))
    watchers.end(one.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(shift))
        fleet.watch(server.servers)
    report = one.folder / "watch.json"

    def shifted() -> bool:
        found = watchers.reported(one.folder)
        return found is not None and abs(found["at"] - time.time() - seconds) < 100

    wait_until(shifted, on_this_machine(10), report.read_text)
    yield
    watchers.end(one.folder)
    fleet.watch(server.servers)
    wait_until(lambda: watchers.reported(one.folder) is not None, on_this_machine(10))


Trouble = Callable[[Running], contextlib.AbstractContextManager[None]]
TROUBLES: dict[str, Trouble] = {
    "no room": no_room,
    "no key": no_key,
    "a key that others may read": open_key,
    "fewer instances": fewer_instances,
    "an hour ahead": lambda server: another_clock(server, 3600),
    "an hour behind": lambda server: another_clock(server, -3600),
}


# Another instance each time, which has run for a while and is repaired without a pause.
@pytest.mark.parametrize(
    ("trouble", "model"),
    [
        ("no room", "decode_0"),
        ("no key", "prefill_1"),
        pytest.param("a key that others may read", "decode_1", marks=pytest.mark.full),
        ("fewer instances", "prefill_0"),
        pytest.param("an hour ahead", "decode_0", marks=pytest.mark.full),
        ("an hour behind", "decode_1"),
    ],
)
def test_a_stub_dies_while_there_is_trouble(server: Running, trouble: str, model: str) -> None:
    one = server.servers[0]
    told = trouble.startswith("an hour")
    slow = changed_code(one, model) if told else contextlib.nullcontext()
    with TROUBLES[trouble](server), slow as code:
        if code is not None:  # the reports of a new process would be received as soon as a notice
            code.write_text(f"import time\ntime.sleep({SLOW_S})\n{code.read_text()}")
        watchdog = watchers.pid(one.folder)
        before = stub(one, model)
        with Load(server, rate=4, tokens=60) as load:
            time.sleep(LOAD_S)
            struck = time.monotonic()
            before.kill()
            wait_until(
                lambda: _replaced(one, model, before) and one.ready(),
                on_this_machine(RELOADED_S) + SLOW_S,
                lambda: said(one)[-2000:],
            )
            back = time.monotonic() - struck
            time.sleep(LOAD_S)
        print(
            f"\n{trouble}: {model} served again after {back:.2f} s; of {len(load.streams)} streams "
            f"{len(load.lost)} lost, {load.retried} went on elsewhere, longest gap {load.gap:.2f} s"
        )
        assert not load.lost
        assert not load.wrong
        assert load.gap < min(on_this_machine(GAP_S), STALL_S - 1)
        assert watchers.pid(one.folder) == watchdog is not None
    wait_until(lambda: _linked(server), on_this_machine(RELOADED_S))


@pytest.mark.full
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_stub_dies_while_there_is_trouble_again_and_again(server: Running, trouble: str) -> None:
    """Instances fail in turn with pauses, so that each is repaired without a further pause."""
    for number in range(20):
        model = ("prefill_0", "decode_0", "prefill_1", "decode_1")[number % 4]
        if trouble == "fewer instances" and model == "prefill_1":
            model = "decode_1"
        test_a_stub_dies_while_there_is_trouble(server, trouble, model)
        time.sleep(3)


def test_a_server_dies_while_the_disk_is_full(server: Running) -> None:
    one = server.servers[0]
    before = leader(one)
    with no_room(server):
        watchdog = watchers.pid(one.folder)
        struck = time.monotonic()
        before.kill()
        wait_until(
            lambda: one.pid not in (None, before.pid) and one.ready(), on_this_machine(RESTARTED_S)
        )
        print(f"\nthe server served again after {time.monotonic() - struck:.2f} s")
        assert watchers.pid(one.folder) == watchdog is not None
    wait_until(
        lambda: watchers.reported(one.folder) is not None and repairs(one) > 0, on_this_machine(10)
    )
    wait_until(lambda: _linked(server), on_this_machine(RELOADED_S))


def test_a_notice_of_another_epoch_changes_nothing(server: Running) -> None:
    """A forged or replayed notice changes nothing; one for the current process works at once."""
    one = server.servers[0]
    secret = key.load(keys.copy(one.folder))
    former = failure_notice.encode(failure_notice.FailureNotice("decode_0", b"no such."), secret)
    forged = failure_notice.encode(
        failure_notice.FailureNotice("decode_0", epoch.of(stub(one, "decode_0").pid)), b"x" * 32
    )
    with Load(server, rate=4, tokens=60) as load:
        time.sleep(LOAD_S)
        _tell(one.grpc, former)
        with pytest.raises(InstanceError, match="only a watchdog of this deployment"):
            _tell(one.grpc, forged)
        time.sleep(LOAD_S)
    assert not load.lost
    assert load.retried == 0

    present = failure_notice.encode(
        failure_notice.FailureNotice("decode_0", epoch.of(stub(one, "decode_0").pid)), secret
    )
    with Load(server, rate=4, tokens=60) as load:
        time.sleep(LOAD_S)
        _tell(one.grpc, present)
        time.sleep(LOAD_S)
    assert not load.lost
    assert not load.wrong
    assert load.retried > 0


def _replaced(server: Server, model: str, before: psutil.Process) -> bool:
    with contextlib.suppress(ValueError, psutil.Error):  # there is none at the moment
        return stub(server, model).pid != before.pid
    return False


def _tell(address: str, notice: str) -> None:
    asyncio.run(asyncio.wait_for(questions.gateway(address, "scheduler", notice), 5))


def _linked(server: Running) -> bool:
    """Check that every prefill and every decode serve, and that all are linked."""
    values = scrape(server.servers[0])
    return (
        values.get('pdserve_kv_links{gateway="scheduler",group="default",state="connected"}') == 4
    )


def test_no_watchdog_is_left(server: Running) -> None:
    """A watchdog without a lock, and without its process id in a file, is found and ended."""
    one = server.servers[0]
    found = watchers.pid(one.folder)
    assert found is not None
    (one.folder / "watch").unlink()
    assert watchers.pid(one.folder) is None
    watchers.end(one.folder)
    assert not psutil.pid_exists(found) or psutil.Process(found).status() == "zombie"
    fleet.watch(server.servers)
    assert watchers.pid(one.folder) is not None
