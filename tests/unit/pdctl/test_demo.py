"""Tests for `pdctl demo`: the question it asks, and how it reports the end of the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from pdctl import cli
from pdctl.chat import Part, Question

if TYPE_CHECKING:
    from pathlib import Path

    from pdctl.server import Server

MS = {"forward": 1.0, "prefill": 2.0, "transfer": 1.0, "exposed": 1.0, "ttft": 4.0, "e2e": 9.0}
STATS: dict[str, Any] = {
    "prompt_tokens": 39,
    "cached_tokens": 0,
    "output_tokens": 22,
    "attempts": 1,
    "prefill": "prefill_0",
    "decode": "decode_0",
    "ms": MS,
    "kv": {"bytes": 1 << 20, "transport": "shm", "strategy": "whole"},
}


class AnsweringServer:
    """A server that gives one answer, and records the questions."""

    grpc = "127.0.0.1:1"

    def __init__(self, finish_reason: str) -> None:
        self.questions: list[Question] = []
        self._finish_reason = finish_reason

    def ask(self, url: str, question: Question) -> Iterator[Part]:
        assert url == self.grpc
        self.questions.append(question)
        yield Part("Plants make food from light.", "", None)
        yield Part("", self._finish_reason, STATS)


def demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finish_reason: str, *arguments: str
) -> tuple[AnsweringServer, str]:
    """Run a demo without servers; return the server that was answering, and the output."""
    file = tmp_path / "deployment.yaml"
    file.write_text("model: m\nservers: [{name: nobody, prefill: [p], decode: [d]}]\n")
    answering = AnsweringServer(finish_reason)

    @contextlib.contextmanager
    def held(servers: list[Server], timeout: float | None) -> Iterator[list[Server]]:
        yield servers

    monkeypatch.setattr(cli.starting, "held", held)
    monkeypatch.setattr(cli, "_gateway", lambda servers: answering)
    monkeypatch.setattr(cli, "ask", answering.ask)
    done = CliRunner().invoke(cli.app, ["demo", "-f", str(file), *arguments])
    assert done.exit_code == 0, done.output
    return answering, done.output


def test_it_asks_what_the_model_answers_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering, output = demo(monkeypatch, tmp_path, "stop")
    (question,) = answering.questions
    assert question.text == cli.DEMO_PROMPT
    assert question.chat
    assert question.options == {"max_tokens": ("INT32", cli.DEMO_TOKENS)}
    assert "Plants make food from light." in output
    assert "(stop: the model ended its answer)" in output


def test_an_answer_that_is_cut_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering, output = demo(monkeypatch, tmp_path, "length", "Hello", "--max-tokens", "22")
    assert answering.questions[0].options == {"max_tokens": ("INT32", 22)}
    assert "(length: cut off after 22 tokens)" in output
