"""The mask token of a diffusion model can't be written: its text is plain text, and all other tokens are as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import ModelLoadError
from engine.tokenizer.mask_token import hide_token
from engine.tokenizer.tokenizer import Tokenizer
from tests.unit.gguf_files import ALPHABET

BEGIN, MASK, END = "<|begin|>", "<|mask|>", "<|end|>"
TEMPLATE = BEGIN + "{% for m in messages %}{{ m.content }}" + END + "{% endfor %}"


def _folder(path: Path, specials: list[str], ignore_merges: bool = False, inside: bool = False) -> Path:
    """Byte tokens, and special tokens behind them: as added tokens alone, or `inside` the model's vocabulary, too."""
    vocab = {token: i for i, token in enumerate(ALPHABET)}
    if inside:
        vocab |= {text: 256 + i for i, text in enumerate(specials)}
    backend = Backend(models.BPE(vocab, merges=[], ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    backend.save(str(path / "tokenizer.json"))
    config = {"mask_token": MASK, "eos_token": END, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def _bytes(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("specials", [[BEGIN, MASK, END], [MASK, BEGIN, END], [BEGIN, END, MASK]])
def test_the_masks_text_is_plain_text(tmp_path: Path, specials: list[str], ignore_merges: bool, inside: bool) -> None:
    folder = _folder(tmp_path, specials, ignore_merges, inside)
    begin, mask, end = (256 + specials.index(text) for text in (BEGIN, MASK, END))
    free, kept = Tokenizer.load(folder), Tokenizer.load(folder, mask_id=mask)
    text = f"{BEGIN}a{MASK}{MASK}b{END}"
    assert free.encode(text) == [begin, *_bytes("a"), mask, mask, *_bytes("b"), end]
    assert kept.encode(text) == [begin, *_bytes(f"a{MASK}{MASK}b"), end]
    assert kept.encode(MASK) == _bytes(MASK)
    assert kept.decode(kept.encode(text), skip_special_tokens=False) == text
    chat = kept.encode_chat([{"role": "user", "content": f"x{MASK}!"}])
    assert chat == [begin, *_bytes(f"x{MASK}!"), end]
    assert kept.vocab_size == free.vocab_size and kept.eos_ids == free.eos_ids == (end,)
    assert kept.is_special(mask) and kept.is_special(end) and kept.token_text(mask) == MASK
    assert kept.decode([mask], skip_special_tokens=False) == MASK and kept.decode([mask]) == ""


def test_a_mask_id_without_a_token_changes_nothing(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [BEGIN, END])
    kept = Tokenizer.load(folder, mask_id=300)  # in the padding of the embedding
    assert kept.encode(f"{BEGIN}{MASK}") == [256, *_bytes(MASK)] and kept.decode([300]) == ""


def test_a_piece_of_a_unigram_vocabulary_is_hidden_too(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), (MASK, -1.0), *((character, -2.0) for character in "<|mask>ab")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    free, kept = Tokenizer.load(tmp_path), Tokenizer.load(tmp_path, mask_id=1)
    assert free.encode(f"a{MASK}b")[1] == 1
    assert 1 not in kept.encode(f"a{MASK}b") and len(kept.encode(f"a{MASK}b")) == 2 + len(MASK)
    assert MASK not in kept.decode([3, 1, 4], skip_special_tokens=False)


def test_merges_that_build_the_mask_go() -> None:
    model: dict[str, Any] = {"vocab": {"<": 0, "m>": 1, "<m>": 2}, "merges": [["<", "m>"]]}
    for merges in ([["<", "m>"]], ["< m>"]):
        values, text = hide_token(json.dumps({"model": {**model, "merges": merges}}), 2)
        assert text == "<m>" and json.loads(values)["model"]["merges"] == []
        assert "<m>" not in json.loads(values)["model"]["vocab"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}, "added_tokens": [3]}']
)
def test_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"can't be read"):
        Tokenizer.load(tmp_path, mask_id=1)
