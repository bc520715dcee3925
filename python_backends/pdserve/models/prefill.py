"""Triton model ``prefill*``: one engine in the prefill role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
from pdserve.engines.prefill import MAX_QUARANTINED, PrefillInstance
from pdserve.metrics import Registry
from pdserve.models.instance import InstanceModel
from pdserve.transfer import plane


class TritonPythonModel(InstanceModel):
    def make(self, name: str, deployment: config.Deployment, metrics: Registry) -> PrefillInstance:
        model = build.model(deployment)
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        slots = deployment.prefill.slots + MAX_QUARANTINED
        holder = plane.holder(deployment, name, terms, slots)
        return PrefillInstance(
            name, model, build.prefill(model), deployment.prefill, holder, terms.cut, metrics
        )
