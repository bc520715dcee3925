"""Triton model ``prefill*``: one engine in the prefill role."""

from __future__ import annotations

from pdserve.triton.instance import InstanceModel


class TritonPythonModel(InstanceModel):
    kind = "prefill"
