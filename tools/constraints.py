"""Constraints for pip in a Python that has packages already: ``constraints.py requirements.txt``.

Installed packages keep their versions, since others were built against them; all other packages get
their versions from the file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def constraints(requirements: Iterable[str]) -> Iterator[str]:
    """Return a line for each line of a requirements file that names a package."""
    for requirement in requirements:
        named = _NAME.match(requirement)
        if named is None:
            continue
        try:
            yield f"{named[0]}=={metadata.version(named[0])}"
        except metadata.PackageNotFoundError:
            yield requirement


if __name__ == "__main__":
    print("\n".join(constraints(Path(sys.argv[1]).read_text().splitlines())))
