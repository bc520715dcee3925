"""Triton model ``prefill*``: one engine in the prefill role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
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
            engine = build.external(name, "prefill", deployment)
            return ExternalPrefill(name, engine, limits, secret, metrics)
        model = build.model(deployment)
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        holder = plane.holder(deployment, name, terms, limits.slots + MAX_QUARANTINED)
        return PrefillInstance(name, model, build.prefill(model), limits, holder, metrics)
