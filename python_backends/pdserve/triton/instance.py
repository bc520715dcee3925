"""The common part of the prefill and the decode model: they receive and send messages."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import triton_python_backend_utils as pb_utils

from pdserve import config, errors
from pdserve.control import first_state
from pdserve.control.assignment import FIRST, Assignment
from pdserve.instances.assigned import Assigned
from pdserve.instances.protocol import DecodeRole, PrefillRole
from pdserve.instances.role_factory import RoleFactory
from pdserve.node import epoch
from pdserve.node.assignment_file import ASSIGNMENTS, AssignmentFile
from pdserve.node.probes import Limits
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.observability.publisher import Publisher
from pdserve.rpc import messages
from pdserve.rpc.messages import Failed
from pdserve.rpc.seal import Refusals, Seal, Unsealed
from pdserve.rpc.server import Answers, Call
from pdserve.supervision import Background
from pdserve.transfer import key
from pdserve.triton import former, stub
from pdserve.triton.backend import LoopThread, deployment, folder, own_heartbeat
from pdserve.triton.outbox import Outbox
from pdserve.triton.readiness import Readiness

# Time within which is released what a gateway held that has died.
ORPHAN_LOOK_S = 1.0


class InstanceModel:
    """A Triton model around one instance.

    Input ``request`` and output ``reply`` are UINT8 [-1]; see ``pdserve.rpc.messages``. A request
    is sealed (``pdserve.rpc.seal``); an unsealed one is refused unread.
    """

    kind: ClassVar[Literal["prefill", "decode", "flexible"]]
    """The instance's fixed role, or that it can have either."""
    _readiness: Readiness | None = None

    def initialize(self, args: dict[str, str]) -> None:
        stub.prepare()
        self._name, asked = args["model_name"], deployment(args)
        self._metrics = Registry()
        former.retire(self._metrics, former.page(asked, self._name), self._name)
        secret, own = key.of(asked), epoch.of(os.getpid())
        self._seal, self._refusals = Seal(secret, self._name), Refusals()
        file = AssignmentFile(folder(args) / ASSIGNMENTS, self._name)
        assignment = self._first_assignment(asked, file.read())
        role = assignment.role
        self._factory = RoleFactory(self._name, asked, secret, self._metrics, role)
        self._longest = messages.longest(self._factory.context_length)
        make = self._make if self.kind == "flexible" else None
        self._instance = Assigned(
            self._name, self.kind, assignment, self._factory.make(role), own, file.write, make
        )
        self._publisher = Publisher(self._metrics, pb_utils.MetricFamily)
        self._publishing = Background()
        self._keys = itertools.count()
        self._heartbeat = own_heartbeat(args, threads=2)
        self._outbox = Outbox(ORPHAN_LOOK_S, self._sender_dead, self._heartbeat, thread=1)
        self._answers = Answers(self._send, own)
        self._loop = LoopThread(self._heartbeat)
        self._loop.run(self._start())
        self._readiness = Readiness(
            self._name, self._heartbeat, lambda: self._factory.engine, Limits.of(asked).idle_s
        )
        self._heartbeat.loaded()

    def _first_assignment(
        self, deployment: config.Deployment, kept: Assignment | None
    ) -> Assignment:
        """Return the assignment that was kept, else the deployment's."""
        if kept is not None and self.kind in ("flexible", kept.role):
            return kept
        # A reload may have taken it out of the deployment.
        unknown = Assignment(FIRST, "none" if self.kind == "flexible" else self.kind)
        return first_state.assignments(deployment).get(self._name, unknown)

    async def _make(self, assignment: Assignment) -> PrefillRole | DecodeRole | None:
        """Make the role instance in another thread: heartbeats and metrics go on meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._factory.make, assignment.role)

    def is_ready(self) -> bool:
        """Tell whether it can be used; see ``readiness``."""
        return self._readiness is not None and self._readiness()

    def execute(self, requests: list[Any]) -> None:
        """Accept every request, without waiting; each is answered by its own sender."""
        self._loop.call(self._accept, requests)

    def finalize(self) -> None:
        self._readiness = None
        self._loop.run(self._close())
        self._outbox.close()
        self._loop.close()
        self._heartbeat.close()

    async def _start(self) -> None:
        self._instance.start(self._sent)
        self._publishing.start(self._publisher.run())

    async def _close(self) -> None:
        await self._publishing.close()
        await self._instance.close()
        await self._factory.close()
        await self._publisher.close()
        await asyncio.sleep(0)  # its last replies are sent in the next turn of the loop

    def _accept(self, requests: list[Any]) -> None:
        for request in requests:
            self._heartbeat.turned(0)  # a burst is one pass of the loop
            self._heartbeat.worked(0)
            # A caller of this model that is no gateway may give any id, or none.
            call = Call(f"{next(self._keys)}", _id(request))
            try:
                self._outbox.open(call.key, request.get_response_sender())
            except Exception as error:  # it cannot be answered; those after it can
                pb_utils.Logger.log_error(f"request not accepted: {error!r}")
                continue
            self._answers.open(call)
            try:
                self._submit(call, *self._opened(request))
            except Unsealed as error:
                self._answers.reply(call, Failed(error.code, str(error)), True)
                self._metrics.add(catalogue.UNSEALED_MESSAGES, 1, instance=self._name)
                if (line := self._refusals.refused(self._name)) is not None:
                    pb_utils.Logger.log_warn(line)
            except errors.PDServeError as error:
                self._answers.reply(call, Failed(error.code, str(error)), True)
            except Exception as error:  # an exception here would leave the caller without an answer
                told = errors.loggable(error)
                pb_utils.Logger.log_error(f"request not accepted: {told}")
                failed = Failed(errors.InstanceError.code, told)
                self._answers.reply(call, failed, True)

    def _opened(self, request: Any) -> tuple[int, memoryview]:
        """Return the number of the assignment that a request is for, and its message.

        Raises Unsealed if it is not from this deployment to this instance.
        """
        try:
            data = memoryview(request.inputs()[0].as_numpy())
        except pb_utils.TritonModelException as error:
            raise Unsealed from error
        return self._seal.open(data, self._longest)

    def _submit(self, call: Call, number: int, data: memoryview) -> None:
        send = partial(self._answers.reply, call)
        self._instance.handle(number, messages.decode_request(data), call.stream, send)

    def _send(self, key: str, data: bytes | None, last: bool) -> None:
        response = None
        if data is not None:
            reply = pb_utils.Tensor("reply", np.frombuffer(data, np.uint8))
            response = pb_utils.InferenceResponse([reply])
        self._outbox.send(key, response, last=last)

    def _sent(self, then: Callable[[], None]) -> None:
        """Call a function in the loop once Triton has all replies that were sent before."""
        # The replies of this turn of the loop come to the outbox in its next turn.
        work = partial(self._loop.call, then)
        asyncio.get_running_loop().call_soon(self._outbox.after, work)

    def _sender_dead(self, key: str) -> None:
        self._loop.call(self._orphaned, key)

    def _orphaned(self, key: str) -> None:
        """Release what a gateway that has died held; a living gateway sends a Release."""
        for call in self._answers.abandon(key):
            self._instance.release(call, lambda _reply, _last: None)


def _id(request: Any) -> str:
    """Return the request id; one that is not UTF-8, which no gateway sends, counts as none."""
    try:
        return request.request_id()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return ""
