"""Paths in a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = ROOT / "deployment.yaml"
MODEL_REPOSITORY = ROOT / "model_repository"
BACKENDS = ROOT / ".cache" / "triton" / "backends"
RUN = ROOT / ".run"
