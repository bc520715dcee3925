"""Triton model ``decode*``: one engine in the decode role."""

from __future__ import annotations

from pdserve import config
from pdserve.engines import build
from pdserve.engines.decode import DecodeInstance
from pdserve.metrics import Registry
from pdserve.models.instance import InstanceModel
from pdserve.transfer import plane


class TritonPythonModel(InstanceModel):
    def make(self, name: str, deployment: config.Deployment, metrics: Registry) -> DecodeInstance:
        model = build.model(deployment)
        engine = build.decode(model, deployment.decode)
        terms = plane.terms(deployment, model.fingerprint, model.layout)
        receiver = plane.receiver(deployment, terms, engine.pool)
        pulls = deployment.transfer.pulls
        peers = len(deployment.instances("decode"))
        turn_tokens = deployment.prefill.batch_tokens
        return DecodeInstance(
            name, model, engine, deployment.decode, receiver, pulls, turn_tokens, peers, metrics
        )
