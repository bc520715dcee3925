"""Makes the instance of one Triton model in the role that it is given, and again in another.

The model's weights are loaded once. What belongs to a role alone is the instance's: the arena and
its lease table, or the pool, the staging buffers and the links, with the threads of each. The
instance gives it back when it is closed, before the next one is made: the memory of both roles is
never there at once.
"""

from __future__ import annotations

from pdserve import config
from pdserve.control.assignment import Role
from pdserve.engines import build
from pdserve.engines.lent import Lent
from pdserve.engines.timed import Timed, TimedDecode, TimedPrefill
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.external.decode import ExternalDecode
from pdserve.instances.external.prefill import ExternalPrefill
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.instances.protocol import DecodeRole, PrefillRole
from pdserve.observability.metrics import Registry
from pdserve.transfer import plane
from pdserve.transfer.consumer.peers import Rates


class RoleFactory:
    """The model of one instance, and the role instances that are made of it, one after another.

    Args:
        secret: key of the deployment.
        first: role of the first instance that is made; for a fixed role, of every one.

    Raises:
        DeploymentError: the model cannot be loaded or served.
    """

    def __init__(
        self,
        name: str,
        deployment: config.Deployment,
        secret: bytes,
        metrics: Registry,
        first: Role,
    ) -> None:
        self._name = name
        self._deployment = deployment
        self._secret = secret
        self._metrics = metrics
        self.engine: Timed | None = None
        """Engine of the present instance; None: there is no instance, or its engine batches by
        itself, so that it has no call to wait for."""
        self._used = False
        """True once a role was made."""
        self._rates: Rates = {}
        """Measured by one decode, for the next one."""
        self._lent: Lent | None = None
        if deployment.engine.external:
            # Where its role may change, the arguments of both are equal (`config.flexible`).
            role: config.Role = "decode" if first == "decode" else "prefill"
            self._lent = Lent(build.external(name, role, deployment))
            self.context_length = self._lent.context_length
        else:
            self._model = build.model(deployment)
            self.context_length = self._model.context_length

    def make(self, role: Role) -> PrefillRole | DecodeRole | None:
        """Make an instance of a role; None: the role is ``none``. The former one is closed.

        Blocks while memory is allocated: tenths of a second for each GiB. The gauges of the former
        role end.

        Raises:
            DeploymentError: there is not enough memory.
        """
        self.engine = None
        if self._used:  # the gauges of a former process are set to 0 instead, and stay so
            self._metrics.drop(instance=self._name)
            self._metrics.drop(decode=self._name)
        self._used = True
        if role == "none":
            return None
        if self._lent is not None:
            return self._external(role, self._lent)
        return self._prefill() if role == "prefill" else self._decode()

    def _external(self, role: config.Role, lent: Lent) -> ExternalPrefill | ExternalDecode:
        deployment, secret = self._deployment, self._secret
        if role == "prefill":
            return ExternalPrefill(self._name, lent, deployment.prefill, secret, self._metrics)
        kind = deployment.engine.kind
        return ExternalDecode(self._name, lent, kind, deployment.decode, secret, self._metrics)

    def _prefill(self) -> PrefillInstance:
        deployment, model = self._deployment, self._model
        limits = deployment.prefill
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        holder = plane.holder(deployment, self._name, terms, limits.slots + MAX_QUARANTINED)
        self.engine = engine = TimedPrefill(build.prefill(model))
        return PrefillInstance(self._name, model, engine, limits, holder, self._metrics)

    def _decode(self) -> DecodeInstance:
        deployment, model = self._deployment, self._model
        limits = deployment.decode
        self.engine = engine = TimedDecode(build.decode(model, limits))
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        receiver = plane.receiver(deployment, terms, engine.pool, self._rates)
        pulls = deployment.transfer.pulls
        turn_tokens = deployment.prefill.batch_tokens
        return DecodeInstance(
            self._name, model, engine, limits, receiver, pulls, turn_tokens, self._metrics
        )

    async def close(self) -> None:
        """End an engine that outlives its instances; they are closed."""
        if self._lent is not None:
            await self._lent.end()
