"""Triton model ``prefill*``: one engine in the prefill role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
from pdserve.engines.timed import TimedPrefill
from pdserve.instances.external.prefill import ExternalPrefill
from pdserve.instances.kv_exports import MAX_QUARANTINED
from pdserve.instances.prefill import PrefillInstance
from pdserve.instances.protocol import PrefillRole
from pdserve.observability.metrics import Registry
from pdserve.transfer import plane
from pdserve.triton.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    def make(
        self, name: str, deployment: config.Deployment, secret: bytes, metrics: Registry
    ) -> PrefillRole:
        limits = deployment.prefill
        if deployment.engine.external:
            external = build.external(name, "prefill", deployment)
            return ExternalPrefill(name, external, limits, secret, metrics)
        model = build.model(deployment)
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        holder = plane.holder(deployment, name, terms, limits.slots + MAX_QUARANTINED)
        self.engine = engine = TimedPrefill(build.prefill(model))
        return PrefillInstance(name, model, engine, limits, holder, metrics)
