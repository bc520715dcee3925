"""Triton model ``prefill*``: one engine in the prefill role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
from pdserve.engines.prefill import PrefillInstance, region_name
from pdserve.metrics import Registry
from pdserve.models.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    def make(self, name: str, deployment: config.Deployment, metrics: Registry) -> PrefillInstance:
        model = build.model(deployment)
        engine = build.prefill(model)
        return PrefillInstance(name, model, engine, deployment.prefill, region_name(name), metrics)
