"""Files of a checkout, an unpacked archive, or an archive of TensorRT-LLM, one at a time.

Nothing is unpacked: members of an archive are looked up by name, so none can be written anywhere.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tensorrt_llm_tables.errors import SourceError

MARK = "tensorrt_llm/version.py"
"""The file that says where in a source the repository's root is."""
MOST_FILE_BYTES = 4 << 20
"""Largest file that is read; llm_args.py has a third of a MiB."""
MOST_MEMBERS = 200_000
MOST_BYTES = 16 << 30
"""Largest sum of sizes in an archive, since a compressed one is decompressed to be listed."""


_T = TypeVar("_T")


class Source:
    """The files of a source, by their path in upstream's repository."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files

    def read(self, path: str) -> str | None:
        """Return the text of a file; None: there is no such file."""
        return self._files.get(path)


def open_source(path: Path, wanted: frozenset[str]) -> Source:
    """Read the wanted files.

    Args:
        path: a folder, or a ``.tar``, ``.tar.gz``, ``.zip`` or ``.whl`` file.

    Raises:
        SourceError: it is none of them, has no ``tensorrt_llm/version.py``, or is too large.
    """
    wanted |= {MARK}
    if path.is_dir():
        return Source(_folder(path, wanted))
    if not path.is_file():
        raise SourceError(f"{path}: no such file or folder")
    try:
        if zipfile.is_zipfile(path):
            return Source(_zip(path, wanted))
        if tarfile.is_tarfile(path):
            return Source(_tar(path, wanted))
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path}: {error}") from error
    raise SourceError(f"{path}: not a folder, tar file, zip file or wheel")


def _folder(path: Path, wanted: frozenset[str]) -> dict[str, str]:
    found = [path, *(inner for inner in path.iterdir() if inner.is_dir())]
    roots = [root for root in found if (root / MARK).is_file()]
    root = _only(roots, path).resolve()
    files = {}
    for name in sorted(wanted):
        file = (root / name).resolve()
        if not file.is_file():
            continue
        if not file.is_relative_to(root):
            raise SourceError(f"{root / name}: a link that leads out of the source")
        _check_size(name, file.stat().st_size)
        files[name] = _text(name, file.read_bytes())
    return files


def _zip(path: Path, wanted: frozenset[str]) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        if len(members) > MOST_MEMBERS:
            raise SourceError(f"{path}: {len(members)} members, at most {MOST_MEMBERS}")
        prefix = _prefix(list(members), path)
        files = {}
        for name in sorted(wanted):
            info = members.get(prefix + name)
            if info is None:
                continue
            _check_size(name, info.file_size)
            with archive.open(info) as stream:
                read = stream.read(MOST_FILE_BYTES + 1)
            _check_size(name, len(read))
            files[name] = _text(name, read)
    return files


def _tar(path: Path, wanted: frozenset[str]) -> dict[str, str]:
    kept: dict[str, bytes] = {}
    total = 0
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive):
            total += member.size
            if count >= MOST_MEMBERS or total > MOST_BYTES:
                raise SourceError(
                    f"{path}: over {MOST_MEMBERS} members or {MOST_BYTES >> 30} GiB unpacked"
                )
            # A link or a device is no file of upstream's that is looked for.
            if not member.isreg() or not any(_ends(member.name, name) for name in wanted):
                continue
            _check_size(member.name, member.size)
            stream = archive.extractfile(member)
            if stream is not None:
                kept[member.name] = stream.read(MOST_FILE_BYTES)
    prefix = _prefix(list(kept), path)
    return {
        name: _text(name, kept[prefix + name]) for name in sorted(wanted) if prefix + name in kept
    }


def _ends(member: str, name: str) -> bool:
    return member == name or member.endswith("/" + name)


def _prefix(names: list[str], path: Path) -> str:
    """Return what stands before upstream's paths in an archive: nothing, or the name of a folder.

    Raises SourceError if that is not one thing.
    """
    found = [name.removesuffix(MARK) for name in names if _ends(name, MARK)]
    return _only([prefix for prefix in found if prefix.count("/") <= 1], path)


def _only(found: list[_T], path: Path) -> _T:
    if len(found) != 1:
        raise SourceError(f"{path}: {MARK} is there {len(found)} times, expected once")
    return found[0]


def _check_size(name: str, size: int) -> None:
    if size > MOST_FILE_BYTES:
        raise SourceError(f"{name}: {size} bytes, at most {MOST_FILE_BYTES}")


def _text(name: str, read: bytes) -> str:
    try:
        return read.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: not UTF-8: {error}") from error
