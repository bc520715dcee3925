"""Triton model ``decode*``: one engine in the decode role."""

from __future__ import annotations

from pdserve.triton.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    kind = "decode"
