"""Tests for what the GPU suite carries to a machine without an index, and its set-up there."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import bootstrap
import elf
import gpu_setup
import gpu_wheels
from bootstrap import SetupError
from gpu_wheels import Slim


def library(*needs: str) -> bytes:
    """Return an ELF file that needs these libraries, mapped from an address other than 0."""
    header, segment, entry = (struct.calcsize(f) for f in ("<16s2HI3QI6H", "<2I6Q", "<2Q"))
    names, offsets = b"\0", []
    for name in needs:
        offsets.append(len(names))
        names += name.encode() + b"\0"
    start, base = header + 2 * segment, 0x10000
    entries = [(1, offset) for offset in offsets] + [(5, base + start), (0, 0)]
    dynamic = b"".join(struct.pack("<2Q", *one) for one in entries)
    at, size = start + len(names), start + len(names) + len(dynamic)
    return (
        struct.pack("<16s2HI3QI6H", elf.MAGIC + b"\2\1\1", 3, 62, 1, 0, header, 0, 0, header,
                    segment, 2, 0, 0, 0)
        + struct.pack("<2I6Q", 1, 5, 0, base, base, size, size, 4096)
        + struct.pack("<2I6Q", 2, 6, at, base + at, base + at, len(dynamic), len(dynamic), entry)
        + names
        + dynamic
    )  # fmt: skip


def test_needed_libraries_are_read_in_order() -> None:
    assert elf.needed(library("libb.so.1", "liba.so")) == ["libb.so.1", "liba.so"]
    assert elf.needed(library()) == []


def test_a_real_library_needs_the_c_library() -> None:
    import msgspec._core

    assert "libc.so.6" in elf.needed(Path(msgspec._core.__file__).read_bytes())


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", elf.MAGIC + b"\1\1", library("x")[:70]])
def test_what_is_no_library_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"ELF|damaged"):
        elf.needed(data)


def test_only_what_the_roots_need_stays() -> None:
    files = {
        "p/__init__.py": b"",
        "p/tests/test_p.py": b"",
        "p/server": library("liba-1.so"),
        "p.libs/liba-1.so": library("libb-2.so", "libc.so.6"),
        "p.libs/libb-2.so": library("liba-1.so"),
        "p.libs/libunused.so": library(),
        "p-1.0.dist-info/METADATA": b"",
        "p-1.0.dist-info/RECORD": b"",
    }
    assert gpu_wheels.chosen(files, Slim(roots=("p/server",))) == {
        "p/__init__.py",
        "p/server",
        "p.libs/liba-1.so",
        "p.libs/libb-2.so",
        "p-1.0.dist-info/METADATA",
    }


def test_what_is_kept_is_kept_although_its_folder_is_dropped() -> None:
    files = {"m/a/x.py": b"", "m/b/y.py": b"", "m/z.py": b""}
    slim = Slim(drop=("m/*/*",), keep=("m/a/*",))
    assert gpu_wheels.chosen(files, slim) == {"m/a/x.py", "m/z.py"}


def test_an_archive_holds_the_files_and_whether_they_are_programs(tmp_path: Path) -> None:
    wheel = tmp_path / "name_x-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as written:
        for name, mode in (("name_x/program", 0o755), ("name_x/data", 0o644)):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            written.writestr(entry, name)
    gpu_wheels.slimmed(wheel, tmp_path)
    gpu_setup.unpack(tmp_path / "name_x-1.2.tar.xz", tmp_path / "site")
    program, data = (tmp_path / "site" / "name_x" / name for name in ("program", "data"))
    assert (program.read_text(), data.read_text()) == ("name_x/program", "name_x/data")
    assert (program.stat().st_mode & 0o111, data.stat().st_mode & 0o111) == (0o111, 0)


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    with pytest.raises(tarfile.FilterError):
        gpu_setup.unpack(tmp_path / "bad.tar.xz", tmp_path / "site")
    assert not (tmp_path / "outside").exists()


def test_versions_are_those_of_the_project() -> None:
    pinned = {one.name: str(one.specifier) for one in gpu_wheels.pins()}
    assert pinned["numpy"] == "==1.26.4"
    assert pinned["nvidia-pytriton"] == bootstrap.TRITON.removeprefix("nvidia-pytriton")
    assert {"nixl-cu13", *gpu_wheels.PACKAGES} < set(pinned)


@pytest.mark.parametrize(("mib", "fits"), [(50, True), (70, False)])
def test_more_than_the_limit_is_an_error(
    mib: int,
    fits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a-1.tar.xz").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(gpu_wheels, "WHEELS", tmp_path)
    monkeypatch.setattr(gpu_wheels, "tree_bytes", lambda: (mib - 1) << 20)
    if fits:
        gpu_wheels.report()
    else:
        with pytest.raises(SetupError, match=r"70\.0 MiB do not fit into 60 MiB"):
            gpu_wheels.report()
    assert "1.00 MiB  a-1.tar.xz" in capsys.readouterr().out


def test_a_python_without_a_shared_library_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python3.12"
    python.write_text(
        "#!/bin/sh\necho /usr/lib\necho libpython3.12.a\necho /x\necho 0\necho 3.12\n"
    )
    python.chmod(0o755)
    assert f"{python} is no Python 3.12" in gpu_wheels.embedded(str(python), tmp_path)
    assert "nowhere" in gpu_wheels.embedded(str(tmp_path / "nowhere"), tmp_path)


def test_archives_are_refused_by_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "VERSION", "3.11")
    with pytest.raises(SetupError, match=r"are for Python 3\.12; this is"):
        gpu_setup.from_archives()


def test_without_archives_it_is_the_ordinary_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_setup, "ARCHIVES", tmp_path / "none")
    monkeypatch.setattr(bootstrap, "main", lambda: 7)
    assert gpu_setup.main() == 7


def test_libraries_that_the_loader_does_not_find_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_setup.unresolved(Path(sys.executable).resolve()) == ""
    lines = "\tlibpython3.12.so.1.0 => not found\n\tlibc.so.6 => /lib/libc.so.6\n"
    told = subprocess.CompletedProcess([], 0, lines, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: told)
    assert gpu_setup.unresolved(Path("stub")) == "libpython3.12.so.1.0 => not found"


def test_without_a_library_of_python_the_error_says_what_to_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_setup, "ARCHIVES", tmp_path)
    with pytest.raises(SetupError, match="make gpu-wheels"):
        gpu_setup.embed(tmp_path)
