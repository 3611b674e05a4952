"""The tokenizer of a model folder: its files, encoding, and the bytes of tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.errors import InvalidRequest, ModelLoadError
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.tokenizer import Tokenizer as OurTokenizer
from tests.unit.demo_tokenizer import demo_tokenizer
from tests.unit.gguf_files import ALPHABET

BOS, EOS, END = 256, 257, 258
WORD = "<end \u6f22>"  # not spelled in the byte alphabet


def _folder(path: Path, tokenizer_config: dict[str, Any] | None = None, **files: Any) -> Path:
    """256 byte tokens, <s>, </s> and WORD, with a tokenizer.json that puts <s> before each text."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken(WORD, special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    for name, data in files.items():
        (path / f"{name}.json").write_text(json.dumps(data))
    return path


def _ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def test_texts_are_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = OurTokenizer.load(_folder(tmp_path))
    assert tokenizer.encode("abcdef") == [BOS, *_ids("abcdef")]
    assert tokenizer.encode("abcdef", add_special_tokens=False) == _ids("abcdef")
    assert tokenizer.encode("a</s>" + WORD, add_special_tokens=False) == [*_ids("a"), EOS, END]
    assert tokenizer.encode("") == [BOS] and tokenizer.vocab_size == 259


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": False}, [*_ids("a")]),
        ({"add_bos_token": True}, [BOS, *_ids("a")]),
        ({"add_eos_token": True}, [*_ids("a"), EOS]),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS, *_ids("a"), EOS]),
        ({}, [BOS, *_ids("a")]),
    ],
)
def test_an_explicit_flag_decides_over_the_post_processor(
    tmp_path: Path, config: dict[str, Any], expected: list[int]
) -> None:
    config = config | {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    assert OurTokenizer.load(_folder(tmp_path, config)).encode("a") == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 6, 5]}, "config": {"eos_token_id": 7}}, (5, 6)),
        ({"generation_config": {"eos_token_id": 0}}, (0,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {}, "config": {"text_config": {"eos_token_id": [8]}}}, (8,)),
        ({"config": {"eos_token_id": "7"}}, (EOS,)),
        ({}, (EOS,)),
    ],
)
def test_end_of_sequence_ids_come_from_the_first_file_that_has_them(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert OurTokenizer.load(_folder(tmp_path, {"eos_token": "</s>"}, **files)).eos_ids == expected


def test_a_model_without_end_of_sequence_has_none(tmp_path: Path) -> None:
    tokenizer = OurTokenizer.load(_folder(tmp_path))
    assert (tokenizer.eos_ids, tokenizer.eos_token, tokenizer.bos_token) == ((), None, None)


def test_tokens_that_the_config_calls_special_are_special(tmp_path: Path) -> None:
    assert not OurTokenizer.load(_folder(tmp_path)).is_special(END)
    listed = {"added_tokens_decoder": {str(END): {"content": WORD, "special": True}, "900": {"content": "<x>"}}}
    for tokenizer in (
        OurTokenizer.load(_folder(tmp_path, listed)),
        OurTokenizer.load(_folder(tmp_path, {"eos_token": WORD})),
        OurTokenizer.load(_folder(tmp_path, special_tokens_map={"eos_token": {"content": WORD}})),
    ):
        assert tokenizer.is_special(END) and tokenizer.vocab_size == 259
        assert tokenizer.decode([*_ids("a"), END]) == "a"
        assert tokenizer.decode([*_ids("a"), END], skip_special_tokens=False) == "a" + WORD


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (["<think>", "</think>"], ("<think>", "</think>")),
        (["</think>", "x", "<think>"], ("<think>", "</think>")),
        (["[THINK]", "[/THINK]"], ("[THINK]", "[/THINK]")),
        (["<|START_THINKING|>", "<|END_THINKING|>", "<think>"], ("<|START_THINKING|>", "<|END_THINKING|>")),
        (["<think>"], None),
        (["<think>", "[/THINK]"], None),
        ([], None),
    ],
)
def test_thinking_is_between_two_added_tokens(tokens: list[str], named: tuple[str, str] | None) -> None:
    backend = Tokenizer(models.BPE(vocab={"<": 0, "t": 1}, merges=[]))
    backend.add_tokens([AddedToken(token, special=False) for token in tokens])
    thinking = OurTokenizer(backend).thinking
    assert thinking == (None if named is None else tuple(backend.token_to_id(token) for token in named))


@pytest.mark.parametrize(
    ("wanted", "tokens", "template", "expected"),
    [
        ("auto", ["<think>", "</think>"], "x", ("think", (2, 3))),
        ("auto", ["[THINK]", "[/THINK]"], "x", ("mistral", (2, 3))),
        ("auto", ["<|channel>", "<channel|>"], "x", ("gemma4", (2, 3))),
        ("auto", [], "{{ '<think>' }}{# </think> #}", ("think", None)),
        ("auto", ["<think>"], "x", ("", None)),
        ("auto", ["<think>", "</think>"], None, ("", (2, 3))),  # no chats, so nothing to tell apart
        ("none", ["<think>", "</think>"], "x", ("", (2, 3))),
        ("qwen3", ["<think>", "</think>"], "x", ("qwen3", (2, 3))),
        ("granite", ["<think>", "</think>"], "x", ("granite", None)),
    ],
)
def test_the_form_of_thoughts(
    wanted: str, tokens: list[str], template: str | None, expected: tuple[str, tuple[int, int] | None]
) -> None:
    backend = Tokenizer(models.BPE(vocab={"<": 0, "t": 1}, merges=[]))
    backend.add_tokens([AddedToken(token, special=True) for token in tokens])
    chat = None if template is None else ChatTemplate({"default": template}, {})
    assert OurTokenizer(backend, template=chat).thinking_form(wanted) == expected


def test_bytes_of_tokens_join_to_characters() -> None:
    tokenizer = demo_tokenizer()
    text = "H\u00e9llo \U0001f600 \u6f22\u5b57\n\t1\x00"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text == tokenizer.decode(ids)
    assert any("\ufffd" in tokenizer.token_text(i) for i in ids)  # some token is a part of a character
    assert tokenizer.token_bytes(2) == b"<|im_end|>" and tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(49152) == tokenizer.token_bytes(-1) == b""


def test_decoding_takes_any_ids_but_no_nonsense() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.decode([]) == "" and tokenizer.decode([1, 49152, 2]) == ""
    assert tokenizer.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"
    for bad in (-1, 1 << 40):
        with pytest.raises(InvalidRequest) as error:
            tokenizer.decode([1, bad])
        assert error.value.param == "tokens"


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "\ud83d\ude00"])
def test_lone_surrogates_are_the_clients_fault(text: str) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as error:
        demo_tokenizer().encode(text)
    assert error.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="surrogate") as error:
        demo_tokenizer().encode_chat([{"role": "user", "content": text}])
    assert error.value.param == "messages"


def test_a_chat_is_encoded_without_a_second_beginning_of_sequence(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}"
    config = {"bos_token": "<s>", "add_bos_token": True, "chat_template": template}
    tokenizer = OurTokenizer.load(_folder(tmp_path, config))
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == [BOS, *_ids("hi")]


def test_threads_share_one_tokenizer() -> None:
    tokenizer = demo_tokenizer()
    texts = [f"text {i} " * (i % 7 + 1) for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda t: (tokenizer.encode(t), tokenizer.encode_chat([{"role": "u", "content": t}])), texts)
        )
    assert found == [(tokenizer.encode(t), tokenizer.encode_chat([{"role": "u", "content": t}])) for t in texts]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json but no tokenizer at all"),
        ("tokenizer.json", "{", "tokenizer.json can't be read"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json can't be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json can't be read"),
        ("tokenizer_config.json", "[1]", "does not hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "can't be read"),
        ("chat_template.jinja", b"\xff\xfe", "chat template of .* can't be read"),
    ],
)
def test_a_broken_folder_is_a_load_error(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = _folder(tmp_path) / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelLoadError, match=message):
        OurTokenizer.load(tmp_path)


def test_other_tokenizer_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"only tokenizer\.model, which are not supported"):
        OurTokenizer.load(tmp_path)
