"""Reads the Dockerfile for tests: its stages, and each instruction as one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pdctl.paths import ROOT

HOME = PurePosixPath("/opt/pdserve")
TEXT = (ROOT / "Dockerfile").read_text()
FINAL = ("cpu", "gpu")


@dataclass(frozen=True)
class Copy:
    """One source of a COPY."""

    origin: str
    """The stage it is copied from; empty: the context."""
    source: str
    target: str


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        """Return the arguments of each instruction of a kind."""
        return [text for found, text in self.instructions if found == word]

    def one(self, word: str) -> str:
        """Return the arguments of the only instruction of a kind."""
        (text,) = self.all(word)
        return text

    def list(self, word: str) -> list[str]:
        """Return the same from its JSON form."""
        words: list[str] = json.loads(self.one(word))
        return words

    @property
    def copies(self) -> list[Copy]:
        found = []
        for text in self.all("COPY"):
            words = shlex.split(text)
            flags = [word for word in words if word.startswith("--")]
            *sources, target = words[len(flags) :]
            origin = next((flag[7:] for flag in flags if flag.startswith("--from=")), "")
            found += [Copy(origin, source, target) for source in sources]
        return found

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for text in self.all("ENV") for word in shlex.split(text))

    @property
    def health(self) -> list[str]:
        """Return the command of its HEALTHCHECK."""
        words: list[str] = json.loads(self.one("HEALTHCHECK").partition(" CMD ")[2])
        return words

    @property
    def commands(self) -> list[list[str]]:
        """Return the commands of RUN, HEALTHCHECK and CMD as words, without redirections."""
        lines = [re.sub(r"--mount=\S+", "", text) for text in self.all("RUN")]
        parts = [part for line in lines for part in line.split("&&")]
        found = [shlex.split(re.sub(r"\s>\s*\S+", "", part)) for part in parts]
        if self.all("CMD"):
            found += [self.health, self.list("CMD")]
        return found


def read() -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first stage, with their defaults, and the stages."""
    bare = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)
    arguments, stages = dict[str, str](), dict[str, Stage]()
    stage = None
    for line in filter(str.strip, re.sub(r"\\\n\s*", " ", bare).splitlines()):
        word, _, text = line.partition(" ")
        text = " ".join(text.split())
        if word == "FROM":
            base, name = text.split(" AS ")
            stage = stages[name] = Stage(name, base)
        elif stage is None:
            assert word == "ARG", line
            name, _, value = text.partition("=")
            arguments[name] = value
        else:
            stage.instructions.append((word, text))
    return arguments, stages


def files(source: str) -> list[str]:
    """Return the files under a path of the context that git has, and new ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", source],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return listed.stdout.splitlines()


def placed(copy: Copy, file: str) -> str:
    """Return the destination of a COPY's file, relative to the WORKDIR."""
    if file == copy.source:
        name = PurePosixPath(file).name if copy.target.endswith("/") else ""
        return str(PurePosixPath(copy.target, name))
    return str(PurePosixPath(copy.target) / PurePosixPath(file).relative_to(copy.source))
