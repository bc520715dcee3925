"""Triton model of instances that may change roles: one engine in the role that it is assigned."""

from __future__ import annotations

from pdserve.triton.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    kind = "flexible"
