"""Tests for the readiness of the models, which newer Tritons ask for.

The models are made in this process, with an imitation of ``triton_python_backend_utils``: the
embedded Triton, 24.10, never calls ``is_ready``.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve.control.assignment import FIRST
from pdserve.engines.timed import TimedDecode, TimedPrefill
from pdserve.node import heartbeat
from pdserve.node.probes import Limits
from pdserve.rpc.messages import PrefillRequest
from pdserve.sampling import Sampling
from tests.clients import wait_until
from tests.servers import emulated_deployment, on_free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STILL_S = 1.0
CALL_S = 0.3


class Logger:
    @staticmethod
    def log_warn(line: str) -> None: ...


class MetricFamily:
    COUNTER = GAUGE = "kind"

    def __init__(self, **_: str) -> None: ...

    def Metric(self, **_: Any) -> MetricFamily:  # noqa: N802 - Triton's name
        return self

    def increment(self, _: float) -> None: ...

    def set(self, _: float) -> None: ...


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], Any]]:
    """Give a function that makes a model of a package's module, by its name in the deployment."""
    stub = ModuleType("triton_python_backend_utils")
    for name, value in {
        "Logger": Logger,
        "MetricFamily": MetricFamily,
        "TritonModelException": RuntimeError,
        "InferenceResponse": dict,
        "Tensor": lambda *_: None,
    }.items():
        setattr(stub, name, value)
    before = {name for name in sys.modules if name.startswith("pdserve.triton.")}
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(heartbeat, "STILL_S", STILL_S)
    monkeypatch.setattr(Limits, "of", classmethod(lambda cls, _: cls(1.0, 1.0, CALL_S)))
    monkeypatch.chdir(tmp_path)
    deployment = on_free_ports(emulated_deployment(tmp_path, {"prefill": {"base_ms": 3000}}))
    transfer = msgspec.structs.replace(deployment.transfer, key_file=str(tmp_path / "kv.key"))
    prefill = msgspec.structs.replace(deployment.prefill, arena_mib=1)
    deployment = msgspec.structs.replace(deployment, transfer=transfer, prefill=prefill)
    (tmp_path / "deployment.yaml").write_bytes(msgspec.yaml.encode(deployment))
    made: list[Any] = []

    def build(module: str, name: str) -> Any:
        # Idle threads turn often, so that a busy machine does not make them stand still.
        monkeypatch.setattr(
            importlib.import_module("pdserve.triton.instance"), "ORPHAN_LOOK_S", 0.1
        )
        model = importlib.import_module(f"pdserve.triton.{module}").TritonPythonModel()
        assert not model.is_ready(), "it is not loaded yet"
        configuration = {"input": [{"name": "text_input"}, {"name": "input_ids"}]}
        model.initialize(
            {
                "model_name": name,
                "model_repository": str(tmp_path / "models"),
                "model_config": json.dumps(configuration),
            }
        )
        made.append(model)
        return model

    yield build
    for model in made:
        model.finalize()
        assert model.is_ready() is False, "it is unloaded"
    for name in [name for name in sys.modules if name.startswith("pdserve.triton.")]:
        if name not in before:
            del sys.modules[name]
            delattr(sys.modules["pdserve.triton"], name.rpartition(".")[2])


MODELS = [("prefill", "prefill_0"), ("decode", "decode_0"), ("flexible", "decode_0"),
          ("pdserve", "pdserve"), ("scheduler", "scheduler")]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), MODELS)
def test_a_model_is_ready_while_its_threads_turn(
    make: Callable[[str, str], Any],
    module: str,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Triton takes nothing but a ``bool`` for an answer."""
    caplog.set_level(logging.WARNING)
    model = make(module, name)
    assert model.is_ready() is True
    time.sleep(1.5 * STILL_S)
    assert model.is_ready() is True, "threads without work turn, too"
    assert not caplog.messages

    over = threading.Event()
    model._loop.call(over.wait, 30)
    wait_until(lambda: model.is_ready() is False, 5)
    assert not model.is_ready()
    over.set()
    wait_until(model.is_ready, 5)
    first, second = caplog.messages
    assert first.startswith(f"{name} is not ready: its event loop has stood still for ")
    assert second == f"{name} is ready"


@pytest.mark.parametrize(("module", "name"), MODELS)
def test_a_model_that_cannot_send_is_not_ready(
    make: Callable[[str, str], Any], module: str, name: str
) -> None:
    """A sending thread stands still where Triton does not take its response."""
    model = make(module, name)
    outbox = model._outbox if hasattr(model, "_answers") else model._outboxes[-1]
    over = threading.Event()
    outbox.after(lambda: over.wait(30))
    wait_until(lambda: model.is_ready() is False, 5)
    over.set()
    wait_until(model.is_ready, 5)


def test_a_prefill_whose_engine_does_not_return_is_not_ready(
    make: Callable[[str, str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its threads turn, and it accepts prompts, but none of them has a first token."""
    model = make("prefill", "prefill_0")
    prompt = (5).to_bytes(4, "little")
    request = PrefillRequest("1", prompt, Sampling(), "", 60_000)
    replies: list[Any] = []
    assert model.is_ready()

    def send(reply: Any, _last: bool) -> None:
        replies.append(reply)

    model._loop.call(model._instance.handle, FIRST, request, "stream", send)
    wait_until(lambda: model.is_ready() is False, 5)
    assert "prefill_0 is not ready: its engine has been busy with one call for " in caplog.text
    wait_until(model.is_ready, 5)
    assert replies, "the call has ended"


def test_a_call_of_an_engine_is_over_however_it_ends() -> None:
    class Engine:
        pool = "rows"
        closed = False

        async def prefill(self, *_: Any) -> int:
            await asyncio.sleep(0.02)
            return 7

        async def step(self, _: Any) -> list[int]:
            await asyncio.sleep(0.02)
            raise RuntimeError("lost")

        def joined(self, sequence: Any) -> None:
            self.sequence = sequence

        def close(self) -> None:
            self.closed = True

    async def run() -> None:
        engine: Any = Engine()
        prefill, decode = TimedPrefill(engine), TimedDecode(engine)
        assert prefill.lasted_s == decode.lasted_s == 0.0
        one = asyncio.create_task(prefill.prefill([]))
        other = asyncio.create_task(decode.step([]))
        gone = asyncio.create_task(TimedDecode(engine).prefill(engine, 0, 1))
        await asyncio.sleep(0.01)
        assert 0.0 < prefill.lasted_s < 1.0
        assert 0.0 < decode.lasted_s < 1.0
        gone.cancel()
        assert await one == 7
        with pytest.raises(RuntimeError, match="lost"):
            await other
        assert prefill.lasted_s == decode.lasted_s == 0.0
        assert await decode.prefill(engine, 0, 1) == 7
        decode.joined(engine)
        assert (decode.pool, engine.sequence) == ("rows", engine)
        decode.close()
        assert engine.closed

    asyncio.run(run())
