"""Model repositories whose models find the fakes of TensorRT-LLM.

Triton's stub ignores PYTHONPATH, so the models must be told themselves. Give what these functions
return to `servers.running` as its ``source``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pdctl.paths import MODEL_REPOSITORY

FAKES = Path(__file__).resolve().parent
BACKEND = FAKES / "tensorrtllm_backend"


def with_tensorrt_llm(folder: Path, source: Path = MODEL_REPOSITORY) -> Path:
    """Copy the project's models so that they can import `tensorrt_llm`."""
    target = folder / "tensorrt_llm_models"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for model in target.glob("*/1/model.py"):
        line = f"import sys\n\nsys.path.insert(0, {str(FAKES)!r})\n"
        model.write_text(line + model.read_text())
    return target


def with_backend(folder: Path, source: Path = MODEL_REPOSITORY, **parameters: str) -> Path:
    """Copy them with the C++ backend's models: `prefill` is its context, `decode` its generation.

    Args:
        parameters: what the placeholders of the models' ``config.pbtxt`` stand for: ``engine_dir``,
            the model's directory, and what is to differ from `DEFAULTS`.
    """
    target = folder / "tensorrtllm_backend_models"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name, model in (("prefill", "context"), ("decode", "generation")):
        shutil.rmtree(target / name)
        fill(model, target / name, **parameters)
    return target


def fill(model: str, target: Path, **parameters: str) -> None:
    """Write the model ``context`` or ``generation`` to a folder, its placeholders filled in."""
    shutil.copytree(BACKEND / model, target, ignore=shutil.ignore_patterns("__pycache__"))
    config = target / "config.pbtxt"
    text = config.read_text()
    for name, value in {**DEFAULTS, **parameters}.items():
        text = text.replace(f"${{{name}}}", value)
    config.write_text(text)


DEFAULTS = {
    "fakes": str(FAKES),
    "triton_max_batch_size": "1",
    "decoupled_mode": "true",
    "max_queue_size": "0",
    "max_beam_width": "1",
    "engine_dir": "",
    "dtype": "auto",
    "max_batch_size": "64",
    "max_tokens_in_paged_kv_cache": "8192",
    "exclude_input_in_output": "true",
    "cancellation_check_period_ms": "100",
}
