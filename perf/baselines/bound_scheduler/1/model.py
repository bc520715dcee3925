"""Baseline: Triton model `scheduler`, which chooses a prefill when a request arrives.

The parameter `policy` of its configuration names the policy; `policies.py` is beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pdserve.triton import scheduler

sys.path.append(str(Path(__file__).parent))

from policies import BOUND


class TritonPythonModel(scheduler.TritonPythonModel):
    """The scheduler model of pdserve, with another scheduler for each group."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.scheduler = BOUND[parameters["policy"]["string_value"]]
        super().initialize(args)
