"""Maps every test of an older commit to its successor, and fails if one has none.

A test that was moved or renamed is found by its name, or else by its body. What cannot be found so
is listed; then either it was dropped, or it was rewritten and a person has to say what became of it
(``--rewritten OLD=NEW``).

    python -m tests.successors 3bc7271
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALIKE = 0.6
"""Least similarity of the bodies of a test and its successor; tests that have nothing to do with
each other have less than 0.5."""


class Function(NamedTuple):
    """A test function: its file and name, and a class name between the two if it has one."""

    file: str
    name: str


class Suite(NamedTuple):
    """All tests of a checkout."""

    cases: dict[Function, list[str]]
    """Parameter ids of each function, in order; one empty id if it has no parameters."""
    bodies: dict[Function, list[str]]
    """Lines of each function's body, as ``ast`` writes them."""


def collect(checkout: Path) -> Suite:
    """Collect the tests of a checkout with this interpreter and the checkout's own packages."""
    path = os.pathsep.join(str(checkout / part) for part in ("python_backends", "tools", "."))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "tests"],
        check=False,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"the tests of {checkout} cannot be collected:\n{done.stdout[-2000:]}")
    cases = defaultdict[Function, list[str]](list)
    for line in done.stdout.splitlines():
        if "::" in line:
            file, _, rest = line.partition("::")
            name, _, parameters = rest.partition("[")
            cases[Function(file, name)].append(parameters.removesuffix("]"))
    return Suite(
        cases,
        {
            one: body
            for file in {one.file for one in cases}
            for one, body in _bodies(checkout, file)
        },
    )


def _bodies(checkout: Path, file: str) -> list[tuple[Function, list[str]]]:
    tree = ast.parse((checkout / file).read_text())
    return [
        (Function(file, node.name), ast.unparse(node.body).splitlines())
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def successors(old: Suite, new: Suite) -> dict[Function, Function | None]:
    """Return the successor of each function; None: it has none."""
    found: dict[Function, Function | None] = {}
    named = defaultdict[str, list[Function]](list)
    for one in new.cases:
        named[one.name].append(one)
    for one in old.cases:
        found[one] = one if one in new.cases else None
    taken = {one for one in found.values() if one}
    # Names are sentences: who has the same one is the same test, whatever has become of its body.
    for least, candidates in ((0.0, lambda one: named[one.name]), (ALIKE, lambda _: new.cases)):
        for one in [one for one, successor in found.items() if successor is None]:
            alike = {
                other: _alike(old.bodies.get(one, []), new.bodies.get(other, []))
                for other in candidates(one)
                if other not in taken
            }
            best = max(alike, key=alike.__getitem__, default=None)
            if best is not None and alike[best] >= least:
                found[one] = best
                taken.add(best)
    return found


def _alike(one: list[str], other: list[str]) -> float:
    matcher = difflib.SequenceMatcher(None, "\n".join(one), "\n".join(other), autojunk=False)
    if matcher.real_quick_ratio() < ALIKE or matcher.quick_ratio() < ALIKE:
        return 0.0
    return matcher.ratio()


def lost(old: list[str], new: list[str]) -> list[str]:
    """Return the parameter ids that have no counterpart among those of the successor.

    Ids that are there no more count as renamed, as long as there are as many new ones.
    """
    gone = [one for one in old if one not in new]
    return gone[len([one for one in new if one not in old]) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("commit", help="whose tests are looked for in this checkout")
    parser.add_argument(
        "--rewritten",
        metavar="OLD=NEW",
        action="append",
        default=[],
        help="a test (FILE::NAME) and what has taken its place; may be given again and again",
    )
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", folder, told.commit], check=True)
        try:
            old, new = collect(Path(folder)), collect(ROOT)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)
    found = successors(old, new)
    for pair in told.rewritten:
        before, after = (Function(*one.split("::", 1)) for one in pair.split("=", 1))
        if before not in found or after not in new.cases:
            raise SystemExit(f"--rewritten {pair}: no such test")
        found[before] = after
    missing = 0
    for one, successor in found.items():
        if successor is None:
            missing += len(old.cases[one])
            print(f"{one.file}::{one.name} has no successor")
            continue
        if successor != one:
            print(f"{one.file}::{one.name} -> {successor.file}::{successor.name}")
        for case in lost(old.cases[one], new.cases[successor]):
            missing += 1
            print(f"{one.file}::{one.name}[{case}] has no successor")
    before, after = (sum(map(len, suite.cases.values())) for suite in (old, new))
    print(f"{before} tests then, {after} now; {missing} without a successor")
    raise SystemExit(bool(missing))


if __name__ == "__main__":
    main()
