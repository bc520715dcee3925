"""Fixed names: the roles of instances, and the models of a gateway."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = get_args(Role)
FLEXIBLE = "flexible"
"""The template of the models of instances that may change roles."""
ENSEMBLE = "ensemble"
"""The model that Triton itself makes of tokenizer, scheduler and detokenizer; it has no process."""
GATEWAY_MODELS = ("pdserve", "scheduler", "tokenizer", "detokenizer", ENSEMBLE)
