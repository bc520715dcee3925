"""The fake of TensorRT-LLM under the library's name, for as long as a test needs it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

FAKES = str(Path(__file__).resolve().parent)
NAME = "tensorrt_llm"


@contextmanager
def tensorrt_llm(version: str = "1.4.0rc1", **environment: str) -> Iterator[ModuleType]:
    """Import it anew, in that version; afterwards ``sys.modules`` is as before."""
    variables = {"FAKE_TENSORRT_LLM_VERSION": version, **environment}
    before = _loaded()
    with mock.patch.dict(os.environ, variables), mock.patch.object(sys, "path", [FAKES, *sys.path]):
        for name in before:
            del sys.modules[name]
        try:
            importlib.import_module(f"{NAME}.llmapi.disagg_utils")
            yield sys.modules[NAME]
        finally:
            for name in _loaded():
                del sys.modules[name]
            sys.modules.update(before)


def _loaded() -> dict[str, ModuleType]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name == NAME or name.startswith(f"{NAME}.")
    }
