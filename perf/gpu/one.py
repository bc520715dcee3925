"""Runs one part in a process of its own: `python -m perf.gpu.one PART SCALE FOLDER test|bench`."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from pathlib import Path

from perf.gpu.outcome import Outcome
from perf.gpu.parts import PARTS
from perf.gpu.scale import SCALES


def main() -> int:
    part, scale, folder, kind = sys.argv[1:]
    faulthandler.enable()
    outcome = Outcome(part, scale, kind, Path(folder))
    failure = ""
    try:
        PARTS[part].run(outcome, SCALES[scale], kind == "bench")
    except Exception as error:
        traceback.print_exc()
        failure = f"{error!r:.2000}"
    return 0 if outcome.end(failure) else 1


if __name__ == "__main__":
    sys.exit(main())
