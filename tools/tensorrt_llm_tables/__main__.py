"""The command line: ``python -m tensorrt_llm_tables SOURCE --commit COMMIT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tensorrt_llm_tables.errors import SourceError
from tensorrt_llm_tables.reading import CLASSES, read, text


def main(arguments: list[str] | None = None) -> int:
    """Print the table of a source, or write it. Returns 1 if it can be neither read nor written."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorrt_llm_tables",
        description="Read the names of TensorRT-LLM's API from its source, without importing it.",
    )
    parser.add_argument(
        "source", type=Path, help="checkout, unpacked archive, .tar.gz, .zip or .whl"
    )
    parser.add_argument("--commit", required=True, help="upstream's commit that the source is of")
    parser.add_argument("--origin", default="", help="where the source is from, if that matters")
    parser.add_argument(
        "--partial",
        action="append",
        default=[],
        choices=list(CLASSES),
        help="a class of which the source has a part at most; may be repeated",
    )
    parser.add_argument(
        "--folder", type=Path, help="write VERSION.json there; without it, print the table"
    )
    given = parser.parse_args(arguments)
    try:
        table, warnings = read(given.source, given.commit, given.origin, given.partial)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if given.folder is None:
        sys.stdout.write(text(table))
        return 0
    target = given.folder / f"{table.version}.json"
    try:
        target.write_text(text(table))
    except OSError as error:
        print(f"{target}: {error.strerror}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
