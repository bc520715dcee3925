"""Tests for the reading of TensorRT-LLM's source, on a small tree written like it."""

from __future__ import annotations

import json
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from pdserve.config import llm_tables
from pdserve.config.llm_tables import Field, Table
from tensorrt_llm_tables import sources
from tensorrt_llm_tables.__main__ import main
from tensorrt_llm_tables.errors import SourceError
from tensorrt_llm_tables.pins import FOLDER, MANIFEST
from tensorrt_llm_tables.reading import read, text

PARAMS = "tensorrt_llm/disaggregated_params.py"
ARGS = "tensorrt_llm/llmapi/llm_args.py"
TREE = {
    "tensorrt_llm/version.py": '# 2026\n__version__ = "9.9.9rc1"\n',
    PARAMS: '''
from nowhere import missing
raise RuntimeError("this is read, and never run")

@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    """Parameters."""

    request_type: Optional[str] = None
    ctx_request_id: Optional[int] = None
    handles: Optional[List[Dict[str, Any]]] = (
        None  # a comment
    )
    computed: Optional[dict] = field(default=None, init=False, repr=False)
    known: ClassVar[int] = 3

    def get_request_type(self) -> tllme.RequestType: ...
''',
    "tensorrt_llm/sampling_params.py": """
class SamplingParams:
    end_id: Optional[int] = None
    stop: Optional[Union[str, List[str]]] = None
    mode: LogprobMode = LogprobMode.RAW
""",
    ARGS: """
class KvCacheConfig(StrictBaseModel, PybindMirror):
    max_gpu_total_bytes: NonNegativeInt = Field(default=0, description="x" "y")
    v2: bool | Literal["auto"] = Field(default="auto", status="prototype")
    window: Annotated[Optional[List[int]], MinLen(1)] = Field(None)

    @field_validator("window")
    @classmethod
    def check(cls, v): ...

class CacheTransceiverConfig(StrictBaseModel, PybindMirror):
    backend: Optional[Literal[
        "DEFAULT", "UCX"]] = Field(
            default=None,
            description="The backend.")

class BaseLlmArgs(StrictBaseModel):
    model_config = {"extra": "forbid"}
    model: Union[str, Path] = Field(description="needed")
    load_format: Literal['auto', 'dummy'] = Field(default='auto')
    mpi_session: Optional[object] = Field(default=None, alias="_mpi_session")
    _state: Optional[int] = PrivateAttr(default=None)

class TorchLlmArgs(BaseLlmArgs):
    load_format: Union[str, LoadFormat] = Field(default=LoadFormat.AUTO)
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)

    @property
    def quant_config(self) -> QuantConfig: ...

    @quant_config.setter
    def quant_config(self, value): ...
""",
    "tensorrt_llm/llmapi/llm.py": """
class BaseLLM:
    def generate_async(self, inputs: PromptInputs, sampling_params=None, *,
                       priority: float = 0.5, salt) -> RequestOutput: ...
    def _private(self): ...

class LLM(BaseLLM):
    async def aget(self, timeout: Optional[float] = 2): ...
    @staticmethod
    def helper(first): ...
""",
    "tensorrt_llm/executor/result.py": """
class CompletionOutput:
    index: int
    token_ids: Optional[List[int]] = field(default_factory=list)
    _last: int = field(default=0, init=False)

class Base:
    def __init__(self):
        self.id = 1
        self._hidden: int = 2
        self.params: Optional[int] = None

class GenerationResult(Base, external.Mixin):
    @property
    def finished(self) -> bool: ...
    def abort(self) -> None: ...
    def __aiter__(self): ...
""",
}


def tree(folder: Path, **changes: str) -> Path:
    """Write the tree; ``changes`` replace text in each of its files."""
    for name, content in TREE.items():
        written = content
        for old, new in changes.items():
            written = written.replace(old, new)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(written)
    return folder


def table(folder: Path) -> Table:
    read_table, warnings = read(folder, "c0ffee")
    assert not warnings
    return read_table


def test_what_is_declared(tmp_path: Path) -> None:
    found = table(tree(tmp_path))
    assert (found.version, found.commit) == ("9.9.9rc1", "c0ffee")
    assert found.files[:2] == ("tensorrt_llm/version.py", PARAMS)
    classes = found.classes
    assert classes["DisaggregatedParams"].fields == {
        "request_type": Field("str | None", "None"),
        "ctx_request_id": Field("int | None", "None"),
        "handles": Field("list[dict[str, Any]] | None", "None"),
        "computed": Field("dict | None", "None", init=False),
    }
    assert "computed" not in classes["DisaggregatedParams"].arguments
    assert classes["SamplingParams"].fields["stop"].type == "str | list[str] | None"
    assert classes["SamplingParams"].fields["mode"].default == "LogprobMode.RAW"
    assert classes["KvCacheConfig"].fields == {
        "max_gpu_total_bytes": Field("int", "0"),
        "v2": Field("bool | Literal['auto']", "'auto'", status="prototype", choices=("auto",)),
        "window": Field("list[int] | None", "None"),
    }
    assert not classes["KvCacheConfig"].methods
    backend = classes["CacheTransceiverConfig"].fields["backend"]
    assert backend == Field("Literal['DEFAULT', 'UCX'] | None", "None", choices=("DEFAULT", "UCX"))
    assert classes["TorchLlmArgs"].fields == {
        "model": Field("str | Path"),
        "load_format": Field("str | LoadFormat", "LoadFormat.AUTO"),
        "mpi_session": Field("object | None", "None", alias="_mpi_session"),
        "kv_cache_config": Field("KvCacheConfig", "<factory>"),
    }
    assert classes["TorchLlmArgs"].properties == ("quant_config",)
    assert classes["LLM"].methods == {
        "generate_async": {
            "inputs": Field("PromptInputs"),
            "sampling_params": Field("", "None"),
            "priority": Field("float", "0.5"),
            "salt": Field(),
        },
        "aget": {"timeout": Field("float | None", "2")},
        "helper": {"first": Field()},
    }
    assert set(classes["CompletionOutput"].fields) == {"index", "token_ids", "_last"}
    assert classes["GenerationResult"].members == {
        "id", "params", "finished", "abort", "__aiter__",
    }  # fmt: skip


def test_a_renamed_field_changes_one_line(tmp_path: Path) -> None:
    before = text(table(tree(tmp_path / "a"))).splitlines()
    after = text(table(tree(tmp_path / "b", ctx_request_id="context_id"))).splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    [(old, new)] = changed
    assert '"ctx_request_id"' in old
    assert '"context_id"' in new


def test_the_text_of_a_table_is_read_again(tmp_path: Path) -> None:
    found = table(tree(tmp_path))
    assert msgspec.json.decode(text(found), type=Table) == found


@pytest.mark.parametrize("version", llm_tables.versions())
def test_the_tables_that_are_shipped_are_written_so(version: str) -> None:
    path = llm_tables.FOLDER / f"{version}.json"
    assert text(llm_tables.table(version)) == path.read_text()
    assert llm_tables.table(version).commit
    assert llm_tables.table(version).files


@pytest.mark.parametrize("prefix", ["", "TensorRT-LLM-9.9.9/"])
def test_archives_are_like_folders(tmp_path: Path, prefix: str) -> None:
    wanted = table(tree(tmp_path / "tree"))
    wheel, archive = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as packed, tarfile.open(archive, "w:gz") as tarred:
        for name in TREE:
            packed.write(tmp_path / "tree" / name, prefix + name)
            tarred.add(tmp_path / "tree" / name, prefix + name)
    assert table(wheel) == table(archive) == wanted
    outer = tmp_path / "unpacked"
    tree(outer / prefix)
    assert table(outer) == wanted


def test_members_that_lead_out_of_an_archive_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(TREE[PARAMS])
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as packed:
        for name, content in TREE.items():
            if name != PARAMS:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, BytesIO(content.encode()))
        link = tarfile.TarInfo(PARAMS)
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        packed.addfile(link)
        climbing = tarfile.TarInfo(f"../../{PARAMS}")
        climbing.size = len(TREE[PARAMS])
        packed.addfile(climbing, BytesIO(TREE[PARAMS].encode()))
    with pytest.raises(SourceError, match=f"no {PARAMS}, which declares DisaggregatedParams"):
        read(archive, "c0ffee")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "secret"]

    folder = tree(tmp_path / "tree")
    (folder / PARAMS).unlink()
    (folder / PARAMS).symlink_to(secret)
    with pytest.raises(SourceError, match="a link that leads out of the source"):
        read(folder, "c0ffee")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path / "tree")
    archive, packed = tmp_path / "a.tar", tmp_path / "a.zip"
    with tarfile.open(archive, "w") as tarred, zipfile.ZipFile(packed, "w") as zipped:
        for name in TREE:
            tarred.add(folder / name, name)
            zipped.write(folder / name, name)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MOST_FILE_BYTES", 100)
        for source in (folder, archive, packed):
            with pytest.raises(SourceError, match="bytes, at most 100"):
                read(source, "c0ffee")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MOST_MEMBERS", 3)
        for source in (archive, packed):
            with pytest.raises(SourceError, match=r"most 3|over 3 members"):
                read(source, "c0ffee")
    monkeypatch.setattr(sources, "MOST_BYTES", 100)
    with pytest.raises(SourceError, match="unpacked"):
        read(archive, "c0ffee")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class KvCacheConfig": "class Other"}, f"{ARGS}: no class KvCacheConfig; there are: Oth"),
        ({"class LLM(BaseLLM):": "class LLM(:"}, "tensorrt_llm/llmapi/llm.py: invalid syntax"),
        ({"__version__ =": "other ="}, "tensorrt_llm/version.py: no constant __version__"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    assert main([str(tree(tmp_path, **changes)), "--commit", "c0ffee"]) == 1
    assert message in capsys.readouterr().err


def test_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no archive")
    for path, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "file", "not a folder, tar file, zip file or wheel"),
        (tmp_path, "tensorrt_llm/version.py is there 0 times, expected once"),
    ):
        assert main([str(path), "--commit", "c0ffee"]) == 1
        assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tree(tmp_path)), "--commit", "c0ffee", "--folder", str(tmp_path / "none")]
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"{tmp_path}/none/9.9.9rc1.json: No such file or directory\n"


def test_a_part_of_a_source(tmp_path: Path) -> None:
    folder = tree(tmp_path)
    (folder / "tensorrt_llm/executor/result.py").unlink()
    partial = ("GenerationResult", "CompletionOutput", "KvCacheConfig")
    found, _ = read(folder, "c0ffee", "a mirror", partial)
    assert found.origin == "a mirror"
    assert not {"GenerationResult", "CompletionOutput"} & set(found.classes)
    assert not found.classes["KvCacheConfig"].complete
    assert found.classes["TorchLlmArgs"].complete


def test_what_upstream_pins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree(tmp_path / "tree")
    pinned = {
        "references/llm.yaml": """
methods:
  __init__:
    parameters:
      kv_cache_config: {annotation: KvCacheConfig, default: null, status: beta}
      unknown: {annotation: int, default: 1}
  generate_async:
    parameters: {}
""",
        "references_committed/sampling_params.yaml": """
methods:
  __init__:
    parameters:
      end_id: {annotation: int, default: null}
properties: {}
""",
    }
    for name, content in pinned.items():
        (folder / FOLDER / name).parent.mkdir(parents=True)
        (folder / FOLDER / name).write_text(content)
    entries = [{"path": "kv_cache_config.v2"}, {"path": "dtype"}, {"path": "moe_config.backend"}]
    (folder / MANIFEST).parent.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"TorchLlmArgs": entries}))
    target = tmp_path / "tables"
    target.mkdir()
    assert main([str(folder), "--commit", "c0ffee", "--folder", str(target)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{target / '9.9.9rc1.json'}\n"
    assert said.err == "warning: TorchLlmArgs.unknown is pinned, and not in the source\n"
    found = msgspec.json.decode((target / "9.9.9rc1.json").read_bytes(), type=Table)
    assert found.classes["TorchLlmArgs"].fields["kv_cache_config"].status == "beta"
    assert found.classes["SamplingParams"].fields["end_id"].status == "committed"
    assert found.classes["KvCacheConfig"].fields["v2"].status == "prototype"
    assert found.nested == {"kv_cache_config": ("v2",), "moe_config": ("backend",)}
    assert MANIFEST in found.files

    (folder / MANIFEST).write_text("[]")
    assert main([str(folder), "--commit", "c0ffee"]) == 1
    assert MANIFEST in capsys.readouterr().err
