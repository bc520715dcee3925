"""Tests that a watchdog repairs what Triton reports ready for ever, and that endpoints tell.

All models are in one server; triton-inference-server/server#7230, #8604 and #7862 are about it.
"""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pdctl import fleet, footprint, links, watchers
from pdctl.server import Server
from pdctl.status import scrape, status
from tests.clients import Part, Refused, generate, generate_stream, wait_idle, wait_until
from tests.faults.serving import (
    KNOWN_S,
    RELOADED_S,
    RESTARTED_S,
    STEP_MS,
    STOPPED_S,
    leader,
    on_this_machine,
    said,
    serves,
    stub,
)
from tests.servers import Running

pytestmark = [pytest.mark.triton, pytest.mark.alone]


def ready(server: Server, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"{server.http}/v2/models/{model}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def slow_to_load(server: Server, model: str) -> Iterator[None]:
    """Otherwise the status of a model that is out of service could not be read in time."""
    with changed_code(server, model) as code:
        code.write_text(f"import time\ntime.sleep(1)\n{code.read_text()}")
        yield


@contextlib.contextmanager
def changed_code(server: Server, model: str) -> Iterator[Path]:
    """Change the file that a model is loaded from, and restore it afterwards."""
    code = server.repository / model / "1" / "model.py"
    good = code.read_text()
    try:
        yield code
    finally:
        code.write_text(good)


@pytest.mark.parametrize("model", ["prefill_0", "tokenizer"])
def test_a_dead_stub_is_not_ready_and_then_replaced(one_server: Running, model: str) -> None:
    one = one_server.servers[0]
    before = one.pid
    with slow_to_load(one, model):
        stub(one, model).kill()
        wait_until(lambda: not ready(one, model), on_this_machine(KNOWN_S), lambda: said(one))
        assert not one.ready()
        wait_until(one.ready, on_this_machine(RELOADED_S))
    assert ready(one, model)
    assert one.pid == before, "the other models of the server keep serving"
    assert serves(one_server)
    assert f"{model} has failed: its process is gone" in said(one)
    answer = generate(one_server, "ensemble", text_input="a", max_tokens=2)
    assert answer.stats["output_tokens"] == 2, "the ensemble is loaded again with its step"


def test_an_answer_whose_detokenizer_dies_ends_with_an_error(one_server: Running) -> None:
    """Afterwards the scheduler's part of it ends, too, and the ensemble answers again."""
    one = one_server.servers[0]
    asked = {"text_input": "a", "max_tokens": 200, "ignore_eos": True}
    struck: list[float] = []

    def heard() -> Iterator[Part]:
        for number, part in enumerate(
            generate_stream(one_server, "ensemble", stream=True, **asked)
        ):
            yield part
            if number == 4:
                stub(one, "detokenizer").kill()
                struck.append(time.monotonic())

    with pytest.raises(Refused, match=r"^in ensemble 'ensemble', ") as refused:
        list(heard())
    told_s = time.monotonic() - struck[0]
    print(f"told after {told_s:.1f} s: {refused.value}")
    assert told_s < on_this_machine(KNOWN_S)

    def answers() -> bool:
        with contextlib.suppress(Refused):
            return generate(one_server, "ensemble", text_input="a", max_tokens=2).text != ""
        return False

    wait_until(answers, on_this_machine(RELOADED_S), lambda: said(one))
    wait_idle(one_server, on_this_machine(200 * STEP_MS / 1e3))


def test_a_stopped_stub_is_replaced(one_server: Running) -> None:
    one = one_server.servers[0]
    process = stub(one, "decode_0")
    with slow_to_load(one, "decode_0"):
        process.suspend()
        wait_until(lambda: not ready(one, "decode_0"), on_this_machine(STOPPED_S))
        wait_until(one.ready, on_this_machine(RELOADED_S))
    assert footprint.is_dead(process)
    assert serves(one_server)


def test_a_model_that_cannot_be_loaded_leaves_the_rest_in_service(one_server: Running) -> None:
    """Loading is tried again and again, and succeeds as soon as it is possible."""
    one = one_server.servers[0]
    before = one.pid
    with changed_code(one, "prefill_1") as code:
        code.write_text("raise ValueError('no weights in /nowhere')")
        stub(one, "prefill_1").kill()
        wait_until(
            lambda: "no weights" in str(watchers.reported(one.folder)), on_this_machine(RELOADED_S)
        )

        def told() -> bool:
            state = status(one)
            return (
                state["state"] == "unhealthy"
                and state["models"]["prefill_1"] == "UNAVAILABLE"  # between two attempts
                and state["watchdog"]["things"]["prefill_1"]["state"] != "healthy"
            )

        wait_until(told, on_this_machine(KNOWN_S), lambda: str(status(one)))
        assert serves(one_server)
    wait_until(one.ready, on_this_machine(2 * RELOADED_S))
    assert one.pid == before


def test_gauges_of_what_is_gone_are_nothing(one_server: Running) -> None:
    """A restarted decode knows none of the prefills that it reached before."""
    one = one_server.servers[0]

    def linked(decode: str) -> bool:
        name, pair = "pdserve_kv_link_bytes_per_second", ("prefill_1", decode)
        return any(
            value
            for series, value in scrape(one).items()
            if series.startswith(name) and all(f'="{part}"' in series for part in pair)
        )

    def repaired(model: str) -> int:
        state = watchers.reported(one.folder)
        return int(state["things"][model]["repairs"]) if state else 0

    wait_until(lambda: linked("decode_0"), on_this_machine(RELOADED_S))
    with changed_code(one, "prefill_1") as code:
        code.write_text("raise ValueError('no weights in /nowhere')")
        stub(one, "prefill_1").kill()
        wait_until(lambda: not ready(one, "prefill_1"), on_this_machine(KNOWN_S))
        before = repaired("decode_0")
        stub(one, "decode_0").kill()
        wait_until(lambda: repaired("decode_0") > before, on_this_machine(RELOADED_S))
        wait_until(lambda: not linked("decode_0"), on_this_machine(KNOWN_S))
        found = links.links(one_server.deployment, [scrape(one)], gone={"prefill_1"})
        over = {(link.prefill, link.decode): link.transport for link in found}
        assert over["prefill_1", "decode_1"] == ""
    wait_until(one.ready, on_this_machine(4 * RELOADED_S))
    wait_until(lambda: linked("decode_0"), on_this_machine(RELOADED_S))


def test_a_dead_server_is_started_again(one_server: Running) -> None:
    one = one_server.servers[0]
    before = leader(one)
    before.kill()
    wait_until(lambda: one.ready() and one.pid != before.pid, on_this_machine(RESTARTED_S))
    assert serves(one_server)


def test_a_dead_watchdog_takes_nothing_with_it(one_server: Running) -> None:
    one = one_server.servers[0]
    found = watchers.pid(one.folder)
    assert found is not None
    psutil.Process(found).kill()
    wait_until(lambda: watchers.pid(one.folder) is None, 2)
    assert status(one)["watchdog"] is None
    assert serves(one_server)
    fleet.watch(one_server.servers)
    wait_until(lambda: watchers.reported(one.folder) is not None, on_this_machine(5))
    fleet.watch(one_server.servers)
    with slow_to_load(one, "decode_0"):
        stub(one, "decode_0").kill()
        wait_until(lambda: not one.ready(), on_this_machine(KNOWN_S))
        wait_until(one.ready, on_this_machine(RELOADED_S))
