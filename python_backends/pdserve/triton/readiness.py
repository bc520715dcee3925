"""Tells Triton whether a model can be used.

Triton asks a model that has ``is_ready`` for its readiness, from release 26.03 on
(triton-inference-server/python_backend#430: README.md, src/pb_stub.cc): with every call of
``/v2/models/MODEL/ready``, and from 26.04 on of ``/v2/health/ready``. It calls it in a thread of
its own, waits 5 s at most, and takes a ``bool`` or a coroutine of one; anything else, an exception,
and silence count as not ready. Older releases never call it.

A model is ready as long as its own work goes on. What happens in other processes is no matter: if
gateways were unready for lack of instances, a fault of one instance would take all of them from
their balancer at once, and servers that start one after another would wait for each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pdserve.engines.timed import Timed
from pdserve.node.heartbeat import Heartbeat

Engine = Callable[[], Timed | None]

_log = logging.getLogger(__name__)


class Readiness:
    """The readiness of one model, from the end of its ``initialize`` on.

    Args:
        heartbeat: counts the model's threads, each of which has to turn.
        engine: returns the model's present engine; None: it has none, or one that batches by
            itself.
        call_s: seconds that a call of the engine lasts at most.
    """

    def __init__(
        self, name: str, heartbeat: Heartbeat, engine: Engine = lambda: None, call_s: float = 0.0
    ) -> None:
        self._name = name
        self._heartbeat = heartbeat
        self._engine = engine
        self._call_s = call_s
        self._told = ""

    def __call__(self) -> bool:
        """Tell whether it can be used, in microseconds; log why it cannot, once."""
        obstacle = self._heartbeat.standing() or self._hangs()
        if bool(obstacle) != bool(self._told):
            _log.warning("%s is %s", self._name, f"not ready: {obstacle}" if obstacle else "ready")
        self._told = obstacle
        return not obstacle

    def _hangs(self) -> str:
        engine = self._engine()
        if engine is None or (lasted_s := engine.lasted_s) <= self._call_s:
            return ""
        return f"its engine has been busy with one call for {lasted_s:.1f} s"
