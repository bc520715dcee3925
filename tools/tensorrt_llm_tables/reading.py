"""A table of a whole source, and its text."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import msgspec

from pdserve.config.llm_tables import Declared, Table
from tensorrt_llm_tables import pins
from tensorrt_llm_tables.declarations import declared, parse, version
from tensorrt_llm_tables.errors import SourceError
from tensorrt_llm_tables.sources import MARK, open_source

CLASSES = {
    "DisaggregatedParams": "tensorrt_llm/disaggregated_params.py",
    "SamplingParams": "tensorrt_llm/sampling_params.py",
    "KvCacheConfig": "tensorrt_llm/llmapi/llm_args.py",
    "CacheTransceiverConfig": "tensorrt_llm/llmapi/llm_args.py",
    "TorchLlmArgs": "tensorrt_llm/llmapi/llm_args.py",
    "LLM": "tensorrt_llm/llmapi/llm.py",
    "CompletionOutput": "tensorrt_llm/executor/result.py",
    "GenerationResult": "tensorrt_llm/executor/result.py",
}


def read(
    path: Path, commit: str, origin: str = "", partial: Collection[str] = ()
) -> tuple[Table, list[str]]:
    """Read a source of TensorRT-LLM.

    Args:
        path: a checkout, an unpacked archive, or an archive.
        commit: the commit it is of.
        origin: a remark on where it is from.
        partial: classes of which it has a part at most; one that is missing is left out.

    Returns:
        The table, and warnings about what upstream pins and was not found.

    Raises:
        SourceError: a file or a class is missing, or cannot be read.
    """
    source = open_source(path, frozenset({*CLASSES.values(), *pins.FILES}))
    pinned = pins.statuses(source)
    classes: dict[str, Declared] = {}
    for name, file in CLASSES.items():
        text = source.read(file)
        if text is None and name in partial:
            continue
        if text is None:
            raise SourceError(f"{path}: no {file}, which declares {name}")
        try:
            found = declared(parse(text, file), name, file)
        except SourceError:
            if name in partial:
                continue
            raise
        fields = {
            key: msgspec.structs.replace(field, status=field.status or pinned.get((name, key), ""))
            for key, field in found.fields.items()
        }
        classes[name] = msgspec.structs.replace(found, fields=fields, complete=name not in partial)
    table = Table(
        version=version(parse(source.read(MARK) or "", MARK), MARK),
        commit=commit,
        files=tuple(name for name in (MARK, *sorted(set(CLASSES.values()) | pins.FILES))
                    if source.read(name) is not None),
        classes=classes,
        origin=origin,
        nested=pins.nested(source),
    )  # fmt: skip
    return table, list(pins.missing(pinned, classes))


def text(table: Table) -> str:
    """Return a table as JSON with a line for each field, so that two versions can be compared."""
    return _lines(msgspec.to_builtins(table), 0) + "\n"


def _lines(value: object, depth: int) -> str:
    if not isinstance(value, dict) or not any(isinstance(one, dict) for one in value.values()):
        return json.dumps(value)
    pad = " " * (depth + 1)
    inner = ",\n".join(
        f"{pad}{json.dumps(name)}: {_lines(one, depth + 1)}" for name, one in value.items()
    )
    return f"{{\n{inner}\n{' ' * depth}}}"
