"""Tokenizers from GGUF metadata: ids, special tokens, and errors for what can't be built exactly.

The expected ids of the demo model are llama.cpp's (its /tokenize on the same file).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelLoadError
from engine.hub.gguf_convert import write_tokenizer
from engine.hub.gguf_pretokenizers import PRE_TOKENIZERS
from engine.hub.gguf_reader import read_gguf
from engine.tokenizer.tokenizer import Tokenizer
from tests.unit.demo_tokenizer import demo_tokenizer
from tests.unit.gguf_files import BOS, BYTE, CONTROL, EOS, PAD, TOKENS, TYPES, USER_DEFINED, write_gguf


def _tokenizer(tmp_path: Path, **keys: Any) -> Tokenizer:
    path = write_gguf(tmp_path / "m.gguf", keys={f"tokenizer.{key}": value for key, value in keys.items()})
    write_tokenizer(read_gguf(path), tmp_path)
    return Tokenizer.load(tmp_path)


def _ggml(**keys: Any) -> dict[str, Any]:
    return {f"ggml.{key}": value for key, value in keys.items()}


def test_the_demo_tokenizer_has_llama_cpps_ids_digits_included() -> None:
    text = "Hello 12345 é <|im_start|>user"
    assert demo_tokenizer().encode(text) == [19556, 216, 33, 34, 35, 36, 37, 26411, 216, 1, 4093]
    assert (demo_tokenizer().vocab_size, demo_tokenizer().bos_token) == (49152, "<|im_start|>")


def test_byte_level_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    pieces = [TOKENS[i] for i in tokenizer.encode("hello hello1234<|im_end|>x<tool>")]
    assert pieces == ["hello", "\u0120hello", "1", "2", "3", "4", "<|im_end|>", "x", "<tool>"]
    assert [tokenizer.is_special(TOKENS.index(t)) for t in ("<|im_end|>", "<tool>", "hello")] == [True, False, False]
    assert tokenizer.eos_ids == (EOS,) and tokenizer.has_chat_template


SPLITS = {
    "smollm": ["hello", "1", "2", "3", "4", "'", "S"],
    "gpt-2": ["hello", "1234", "'", "S"],
    "qwen2": ["hello", "1", "2", "3", "4", "'", "S"],
    "llama-bpe": ["hello", "12", "3", "4", "'", "S"],
    "default": ["hello", "12", "3", "4", "'", "S"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_the_named_pre_tokenizer_decides_how_text_is_cut(tmp_path: Path, pre: str) -> None:
    tokenizer = _tokenizer(tmp_path, **_ggml(pre=pre))
    assert [TOKENS[i] for i in tokenizer.encode("hello1234'S")] == SPLITS[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_every_byte(tmp_path: Path, pre: str) -> None:
    tokenizer, text = _tokenizer(tmp_path, **_ggml(pre=pre)), " Hé 12345\r\n\t ½漢\U0001f600  don'T x  "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, True), (False, False)])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path, bos: bool, eos: bool) -> None:
    tokenizer = _tokenizer(tmp_path, **_ggml(add_bos_token=bos, add_eos_token=eos))
    middle = [TOKENS.index("hello")]
    assert tokenizer.encode("hello") == [BOS] * bos + middle + [EOS] * eos
    assert tokenizer.encode("hello", add_special_tokens=False) == middle
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_end_of_turn_tokens_are_special_even_where_the_file_forgot(tmp_path: Path) -> None:
    types = [1 if t == "<|im_end|>" else kind for t, kind in zip(TOKENS, TYPES, strict=True)]
    assert _tokenizer(tmp_path, **_ggml(token_type=types)).encode("<|im_end|>") == [EOS]


# A SentencePiece vocabulary: controls, 256 byte tokens, then pieces with falling scores.
PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "llo", "hello", "▁hello", "1", "2", "é", "el"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "  "]
SPM_TYPES = [2, CONTROL, CONTROL, *[BYTE] * 256, *[1] * len(PIECES), USER_DEFINED]
SPM = _ggml(model="llama", pre="default", tokens=SPM_TOKENS, token_type=SPM_TYPES)
SPM |= _ggml(scores=[0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [-1000.0])
SPM |= _ggml(bos_token_id=1, eos_token_id=2, padding_token_id=0, add_bos_token=True)


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, **SPM)
    pieces = [SPM_TOKENS[i] for i in tokenizer.encode("hello hello1é漢  h")]
    bytes_of_han = ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert pieces == ["<s>", "▁hello", "▁hello", "1", "é", *bytes_of_han, "  ", "▁", "h"]
    assert [SPM_TOKENS[i] for i in tokenizer.encode("hel")] == ["<s>", "▁", "he", "l"]  # "el" has a lower score
    assert tokenizer.decode(tokenizer.encode("hello hello1é漢")) == "hello hello1é漢"
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_sentencepiece_without_a_space_before_the_first_word(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, **SPM | _ggml(add_space_prefix=False))
    assert [SPM_TOKENS[i] for i in tokenizer.encode("hello hello")] == ["<s>", "hello", "▁hello"]
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"


def test_phi3_tokens_swallow_the_white_space_after_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", keys={"general.name": "Phi-3 mini"})
    write_tokenizer(read_gguf(path), tmp_path)
    assert [TOKENS[i] for i in Tokenizer.load(tmp_path).encode("<|im_end|>\n hello")] == ["<|im_end|>", "hello"]


def test_the_folder_says_what_transformers_needs(tmp_path: Path) -> None:
    _tokenizer(tmp_path, **_ggml(add_bos_token=True))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["pad_token"]) == (True, TOKENS[PAD])
    assert "<|im_start|>" in (tmp_path / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (_ggml(pre="hieroglyphs"), "'hieroglyphs' is not supported; known: command-r, deepseek"),
        (_ggml(model="bert"), "'bert' are not supported"),
        (_ggml(model="llama"), "no scores"),
        (_ggml(model="llama", scores=[0.0] * len(TOKENS)), "without byte tokens"),
        (_ggml(token_type=[1, 2]), "268 tokens but 2 token types"),
        (_ggml(tokens=["a"] * len(TOKENS)), "share one text"),
        (_ggml(merges=["h q q"]), "can't be built"),
        (_ggml(tokens=7), "expected a list of texts"),
    ],
)
def test_what_cannot_be_built_exactly_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        _tokenizer(tmp_path, **keys)
