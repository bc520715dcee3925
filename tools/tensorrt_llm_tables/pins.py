"""TensorRT-LLM's own lists of its API: what it promises not to change, and what it reports.

Sources: tests/unittest/api_stability/references and references_committed, with parameters, types,
defaults and status as YAML, and tensorrt_llm/usage/llm_args_golden_manifest.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pdserve.config.llm_tables import Declared
from tensorrt_llm_tables.errors import SourceError
from tensorrt_llm_tables.sources import Source

FOLDER = "tests/unittest/api_stability"
MANIFEST = "tensorrt_llm/usage/llm_args_golden_manifest.json"
# The class whose constructor, and the one whose methods, a list is about.
PINNED = {
    "llm": ("TorchLlmArgs", "LLM"),
    "sampling_params": ("SamplingParams", "SamplingParams"),
    "completion_output": ("CompletionOutput", "CompletionOutput"),
    "request_output": ("GenerationResult", "GenerationResult"),
}
LISTS = ("references", "references_committed")
FILES = frozenset(
    {MANIFEST, *(f"{FOLDER}/{kind}/{name}.yaml" for kind in LISTS for name in PINNED)}
)
COMMITTED = "committed"
"""The status of what is in ``references_committed`` and has none of its own."""


def statuses(source: Source) -> dict[tuple[str, str], str]:
    """Return the status of each pinned name, by class and name; "" for none.

    Raises:
        SourceError: a list is not what it was.
    """
    found: dict[tuple[str, str], str] = {}
    for kind in LISTS:
        for name, (constructed, called) in PINNED.items():
            path = f"{FOLDER}/{kind}/{name}.yaml"
            text = source.read(path)
            if text is None:
                continue
            try:
                read = yaml.safe_load(text)
                methods = read["methods"]
                parameters = (methods.get("__init__") or {}).get("parameters") or {}
                pinned = [((constructed, key), value) for key, value in parameters.items()]
                pinned += [
                    ((called, key), value)
                    for key, value in (methods | (read.get("properties") or {})).items()
                    if key != "__init__"
                ]
                for key, value in pinned:
                    status = (value or {}).get("status") or ""
                    found[key] = status or (COMMITTED if kind == LISTS[1] else found.get(key, ""))
            except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
                raise SourceError(f"{path}: {error!r}") from error
    return found


def nested(source: Source) -> dict[str, tuple[str, ...]]:
    """Return the names below each argument of ``LLM`` that the manifest lists, sorted.

    Raises:
        SourceError: the manifest is not what it was.
    """
    text = source.read(MANIFEST)
    if text is None:
        return {}
    found: dict[str, set[str]] = {}
    try:
        for entry in json.loads(text)["TorchLlmArgs"]:
            above, _, name = entry["path"].partition(".")
            if name:
                found.setdefault(above, set()).add(name)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{MANIFEST}: {error!r}") from error
    return {above: tuple(sorted(names)) for above, names in sorted(found.items())}


def missing(
    pinned: Mapping[tuple[str, str], Any], classes: Mapping[str, Declared]
) -> Iterator[str]:
    """Yield what is pinned and was not found in the source: it was not read well."""
    for of, name in pinned:
        if of in classes and name not in classes[of].members | classes[of].arguments:
            yield f"{of}.{name} is pinned, and not in the source"
