"""Tests for a model with a faulty chat template, and one with a failing tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.clients import Refused, generate, post
from tests.servers import Running, default_deployment, emulated_deployment, running

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("chat")
    model = folder / "model"
    model.mkdir()
    whole = Path(default_deployment("emulated").model)
    (model / "config.json").write_bytes((whole / "config.json").read_bytes())
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # without a token for other words
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(model / "tokenizer.json"))
    config = {"chat_template": "{% for turn in messages %}{{ turn.content }"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    deployment = emulated_deployment(folder, {})
    with running(msgspec.structs.replace(deployment, model=str(model)), folder) as started:
        yield started


def test_chat_is_refused_as_the_model_s_fault(server: Running) -> None:
    says = "UNSUPPORTED: chat is true, but the model's chat template is faulty: line 1: "
    for model in ("pdserve", "tokenizer"):
        body = {"text_input": "a SECRET", "chat": True}
        _, answer = post(server, f"/v2/models/{model}/generate", body)
        assert answer["error"].startswith(says)
    log = server.servers[0].read_log()
    assert log.count("chat is refused: the model's chat template is faulty: line 1") == 2
    assert "SECRET" not in log


def test_a_tokenizer_that_fails_says_nothing_of_the_prompt(server: Running) -> None:
    for model in ("pdserve", "tokenizer"):
        status, answer = post(server, f"/v2/models/{model}/generate", {"text_input": "a SECRET"})
        assert status in (400, 500)
        assert answer["error"].startswith("INTERNAL: ")
        assert "server's log" in answer["error"]
        assert "SECRET" not in answer["error"]
    assert "SECRET" not in server.servers[0].read_log()


def test_the_rest_works(server: Running) -> None:
    assert generate(server, text_input="a b", max_tokens=2).finish_reason == "length"
    with pytest.raises(Refused, match="INVALID_ARG: text_input is empty"):
        generate(server, text_input="")
