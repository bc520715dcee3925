"""Gathers what the GPU suite needs on a machine that has Python 3.12 and torch, and no index.

    .venv/bin/python tools/gpu_wheels.py [--python PYTHON3.12]

Each package becomes an archive in .cache/gpu-wheels, NAME-VERSION.tar.xz: the files of its wheel
that are used. Of compiled libraries these are the ones that the named roots need; debug symbols
are removed where `strip` is installed. gpu_setup.py unpacks the archives. The stub of Triton for
Python 3.12 embeds that version's shared library: a machine without it gets the one of the Python
3.12 that is named, or on PATH, here.

The archives and the working tree together must fit into LIMIT_MIB.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

import bootstrap
import elf
from bootstrap import CACHE, ROOT, SetupError

WHEELS = CACHE / "gpu-wheels"
PYTHON = "3.12"
LIMIT_MIB = 60
# manylinux_2_35 is that of nvidia-pytriton, and so the oldest glibc on which the suite runs.
GLIBC = 35
EMBEDDED = "libpython"
"""Name of the archive with the library that the stub embeds."""

# What is imported in the processes of a server and of the suite, and is not brought along by torch.
# Left out are accelerate and gguf, for GGUF files only, and typer, for command lines.
PACKAGES = (
    *("anyio", "certifi", "grpcio", "h11", "httpcore2", "httpx2", "huggingface-hub", "idna"),
    *("ml-dtypes", "msgspec", "numpy", "packaging", "protobuf", "psutil", "python-rapidjson"),
    *("pyyaml", "regex", "rich", "safetensors", "tokenizers", "tqdm", "transformers"),
    *("tritonclient", "truststore", "uvloop"),
)
UNUSED = (
    *("*/tests/*", "*/_tests/*", "*.pyi", "*.pyx", "*.pxd", "*.c", "*.h", "*.a", "*.la", "*.f90"),
    *("*.data/*", "*.scripts/*", "*/RECORD", "*.dist-info/licenses/*", "*.dist-info/sboms/*"),
)
MODELS = ("auto", "llama")
"""Folders of transformers.models that stay: each other one is imported only for its own models."""


@dataclass(frozen=True)
class Slim:
    """What stays of a wheel."""

    roots: tuple[str, ...] = ()
    """Patterns of compiled files; if given, of the others only those stay that these need."""
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    """Patterns that stay although `drop` matches."""


SLIM = {
    "nvidia-pytriton": Slim(
        roots=(
            "pytriton/tritonserver/bin/tritonserver",
            "pytriton/tritonserver/backends/python/*",
            f"pytriton/tritonserver/python_backend_stubs/{PYTHON}/*",
        ),
        drop=("pytriton/*",),
        keep=("pytriton/tritonserver/backends/python/*",),
    ),
    "nixl-cu13": Slim(
        # UCX opens its modules by name.
        roots=("nixl_cu13/*.so", "*/libplugin_UCX.so", "nixl_cu13.libs/ucx/libuc[mt]_*.so*"),
        drop=("nixl_ep_cu13/*",),
    ),
    "numpy": Slim(drop=("numpy/f2py/*", "numpy/distutils/*", "numpy/array_api/*")),
    "transformers": Slim(
        drop=("transformers/models/*/*", "transformers/cli/*"),
        keep=tuple(f"transformers/models/{name}/*" for name in MODELS),
    ),
}


def pins() -> list[Requirement]:
    """Return the exact version of every package, as in the project's own environment."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    known = {one.name: one for one in listed if not one.marker or one.marker.evaluate(there)}
    nixl = Requirement(f"nixl-cu13{known['nixl-cu12'].specifier}")
    wanted = [known[name] for name in PACKAGES]
    return [Requirement(bootstrap.TRITON), nixl, *wanted]


def download(packages: Iterable[Requirement], folder: Path) -> None:
    """Fetch the wheels for Python 3.12 on x86_64."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    bootstrap.command(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--python-version", PYTHON, "--implementation", "cp", "--dest", folder),
        *(word for name in platforms for word in ("--platform", name)),
        *(f"{one.name}{one.specifier}" for one in packages),
    )


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def chosen(files: Mapping[str, bytes], slim: Slim) -> set[str]:
    """Return the names of the files that stay, of all files of a wheel."""
    kept = {
        name
        for name in files
        if not matches(name, UNUSED) and (matches(name, slim.keep) or not matches(name, slim.drop))
    }
    if not slim.roots:
        return kept
    compiled = {name for name, data in files.items() if data.startswith(elf.MAGIC)}
    roots = {name for name in files if matches(name, slim.roots)}
    libraries: dict[str, list[str]] = {}
    for name in compiled:
        libraries.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    found, todo = set[str](), roots & compiled
    while todo:
        name = todo.pop()
        found.add(name)
        wanted = {at for library in elf.needed(files[name]) for at in libraries.get(library, ())}
        todo |= wanted - found
    return (kept - compiled) | found | (roots - compiled)


def stripped(data: bytes) -> bytes:
    """Return a library without symbols that only debuggers need; unchanged without `strip`."""
    program = shutil.which("strip")
    if program is None:
        return data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library"
        path.write_bytes(data)
        done = subprocess.run([program, "--strip-unneeded", path], capture_output=True, check=False)
        return data if done.returncode else path.read_bytes()


def pack(path: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write an archive of names with contents and modes; x86 code is compressed as such."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]
    with (
        lzma.open(path, "wb", format=lzma.FORMAT_XZ, filters=filters) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, (data, mode) in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))


def slimmed(wheel: Path, target: Path) -> None:
    """Make the archive of a wheel."""
    name, version = wheel.name.split("-")[:2]
    with zipfile.ZipFile(wheel) as archive:
        entries = {one.filename: one for one in archive.infolist() if not one.is_dir()}
        files = {name: archive.read(name) for name in entries}
    slim = SLIM.get(name.replace("_", "-"), Slim())
    # A library whose needs were rewritten by auditwheel may not survive it.
    patched = any(".libs/" in name for name in files)
    kept = {}
    for member in chosen(files, slim):
        data = files[member]
        if data.startswith(elf.MAGIC) and not patched:
            data = stripped(data)
        executable = entries[member].external_attr >> 16 & 0o100
        kept[member] = data, 0o755 if executable else 0o644
    pack(target / f"{name}-{version}.tar.xz", kept)


def embedded(python: str, target: Path) -> str:
    """Pack the library and compiled modules of a Python 3.12; return the reason if it has none.

    Modules are packed, too, since a Python that is one program has many of them in itself, where
    the library looks for files.
    """
    code = (
        "import sysconfig as s; print(*map(s.get_config_var, ('LIBDIR', 'INSTSONAME', 'DESTSHARED',"
        "'Py_ENABLE_SHARED', 'VERSION')), sep='\\n')"
    )
    try:
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    words = told.stdout.splitlines()
    if told.returncode or len(words) != 5 or words[3:] != ["1", PYTHON]:
        return f"{python} is no Python {PYTHON} with a shared library"
    library, modules = Path(words[0]) / words[1], Path(words[2])
    if not library.is_file():
        return f"{library} is not there"
    files = {library.name: (stripped(library.read_bytes()), 0o755)}
    for path in modules.glob("*.so"):
        if "test" not in path.name:
            files[f"lib-dynload/{path.name}"] = stripped(path.read_bytes()), 0o755
    pack(target / f"{EMBEDDED}-{PYTHON}.tar.xz", files)
    return ""


def make(python: str) -> None:
    """Make all archives anew."""
    bootstrap.fresh(WHEELS)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        download(pins(), Path(folder))
        for wheel in sorted(Path(folder).glob("*.whl")):
            slimmed(wheel, WHEELS)
    if lacking := embedded(python, WHEELS):
        print(f"the library that the stub embeds is not carried: {lacking}")


def tree_bytes() -> int:
    """Return the bytes of the working tree, without what git ignores."""
    command = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in listed.split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def report() -> None:
    """Print all sizes. Raises SetupError: they are too large together."""
    sizes = {path.name: path.stat().st_size for path in WHEELS.glob("*.tar.xz")}
    sizes["the working tree"] = tree_bytes()
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:8.2f} MiB  together, of {LIMIT_MIB} MiB at most")
    if total > LIMIT_MIB:
        raise SetupError(f"{total:.1f} MiB do not fit into {LIMIT_MIB} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=f"python{PYTHON}", help="whose library is carried")
    python = parser.parse_args().python
    sources = [Path(__file__).read_text(), *(str(one) for one in pins())]
    inputs = [*sources, python, shutil.which("strip") or ""]
    step = bootstrap.Step("gpu wheels", WHEELS, inputs, lambda: make(python))
    try:
        bootstrap.run_steps([step])
        report()
    except SetupError as error:
        print(f"gpu wheels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
