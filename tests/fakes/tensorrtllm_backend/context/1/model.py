"""Triton model `context`; its parameter `fakes` says where the code is."""

from __future__ import annotations

import json
import sys
from typing import Any


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        sys.path.insert(0, json.loads(args["model_config"])["parameters"]["fakes"]["string_value"])
        from tensorrtllm_backend.model import Model

        self._model = Model(args)

    def execute(self, requests: list[Any]) -> None:
        self._model.execute(requests)

    def finalize(self) -> None:
        self._model.close()
