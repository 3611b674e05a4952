"""GET /tokenizer_info: what clients need that tokenize by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.tokenizer.tokenizer import Tokenizer
from tests.server.fake_engine import TEMPLATE, FakeEngine, make_tokenizer
from tests.server.harness import error_of, serving


@pytest.mark.asyncio
async def test_it_tells_special_tokens_and_the_template() -> None:
    async with serving(FakeEngine(), FakeEngine("other", tokenizer=make_tokenizer(template=None))) as client:
        for path in ("/tokenizer_info", "/v1/tokenizer_info"):
            info = (await client.get(path)).json()
            assert info["tokenizer_class"] and info["eos_token"] == "<eos>" and info["chat_template"] == TEMPLATE
        assert "chat_template" not in (await client.get("/tokenizer_info", params={"model": "other"})).json()
        error_of(await client.get("/tokenizer_info", params={"model": "third"}), 404)


@pytest.mark.asyncio
async def test_it_is_behind_the_key() -> None:
    async with serving(FakeEngine(), api_key="secret") as client:
        error_of(await client.get("/tokenizer_info"), 401)
        assert (await client.get("/tokenizer_info", headers={"authorization": "Bearer secret"})).status_code == 200


def test_a_checkpoint_tells_no_paths(tmp_path: Path) -> None:
    make_tokenizer()._backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "name_or_path": "/home/someone/model",
        "vocab_file": "/home/someone/vocab.json",
        "eos_token": {"content": "<eos>", "special": True},
        "added_tokens_decoder": {"257": {"content": "<eos>", "special": True}},
        "model_max_length": 2048,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(tmp_path).info == {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<eos>",
        "added_tokens_decoder": {"257": "<eos>"},
        "model_max_length": 2048,
        "chat_template": "{{ messages }}",
    }
