"""Triton model ``decode*``: one engine in the decode role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
from pdserve.engines.timed import TimedDecode
from pdserve.instances.decode import DecodeInstance
from pdserve.instances.external.decode import ExternalDecode
from pdserve.instances.protocol import DecodeRole
from pdserve.observability.metrics import Registry
from pdserve.transfer import plane
from pdserve.triton.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    def make(
        self, name: str, deployment: config.Deployment, secret: bytes, metrics: Registry
    ) -> DecodeRole:
        limits = deployment.decode
        if deployment.engine.external:
            external = build.external(name, "decode", deployment)
            kind = deployment.engine.kind
            return ExternalDecode(name, external, kind, limits, secret, metrics)
        model = build.model(deployment)
        self.engine = engine = TimedDecode(build.decode(model, limits))
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        receiver = plane.receiver(deployment, terms, engine.pool)
        pulls = deployment.transfer.pulls
        turn_tokens = deployment.prefill.batch_tokens
        return DecodeInstance(name, model, engine, limits, receiver, pulls, turn_tokens, metrics)
