"""Rendered chats equal those of transformers, character by character, refusals included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import InvalidRequest
from engine.hub.gguf_convert import write_tokenizer
from engine.hub.gguf_reader import read_gguf
from engine.hub.resolve import find_demo
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.tokenizer import Tokenizer
from tests.unit.chat_template_texts import TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
USER = {"role": "user", "content": ' What is 2+2? <b>&amp; "é" 你好</b>\n'}
ANSWER = {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nIt is 4. "}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "é adds", "parameters": {"type": "object", "a": [1, None, True]}},
    }
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "And 3+3?"}],
    "ends with assistant": [USER, ANSWER],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning": "so so"}],
    "thinking": [USER, {"role": "assistant", "content": "4", "thinking": "hm", "reasoning_content": "so"}, USER],
    "tools": [USER, CALL, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " Hi "}, {"type": "image"}]}],
    "wrong order": [ANSWER, USER],
    "unknown role": [{"role": "skip", "content": "x"}, USER],
    "no content": [{"role": "user", "content": None}],
    "missing content": [{"role": "user"}],
    "none": [],
}


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _ours(source: str, chat: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return ChatTemplate({"default": source}, SPECIAL).render(chat, **options)
    except InvalidRequest:
        return None


def _theirs(tokenizer: PreTrainedTokenizerFast, source: str, chat: list[dict[str, Any]], **options: Any) -> str | None:
    extra = options.pop("template", None) or {}
    try:
        text = tokenizer.apply_chat_template(chat, chat_template=source, tokenize=False, **options, **extra)
    except Exception:  # whatever it raises, ours must refuse, too
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_chat_renders_as_in_transformers(theirs: PreTrainedTokenizerFast, name: str) -> None:
    template, rendered = TEMPLATES[name], 0
    for chat in CHATS.values():
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "tools": TOOLS},
            {"add_generation_prompt": True, "template": {"enable_thinking": False, "date_string": "today"}},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            expected = _theirs(theirs, template, chat, **options)
            assert _ours(template, chat, **options) == expected, (name, chat, options)
            rendered += expected is not None
    assert rendered >= 15  # most combinations render; the others must be refused by both


def test_the_demo_models_chats_have_the_ids_of_transformers(tmp_path: Path) -> None:
    write_tokenizer(read_gguf(find_demo()), tmp_path)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for chat in ([USER], [SYSTEM, USER, ANSWER, USER], [{"role": "user", "content": "1 22 333"}] * 20):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == expected
        assert ours.encode(chat[0]["content"]) == theirs(chat[0]["content"])["input_ids"]
