"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file, with the token ids of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from engine.errors import ModelLoadError
from engine.hub.gguf_pretokenizers import find_pre_tokenizer
from engine.hub.gguf_reader import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # ggml's token types
_SPACE = "\u2581"  # how SentencePiece writes a space
# Tokens that end a generation by their text, as in llama.cpp: older files do not mark them in their metadata.
_END_TEXTS = frozenset(("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a file with their types, and the ids with a role (None where there is none)."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos: int | None
    eos: int | None
    pad: int | None
    unknown: int | None
    ends: tuple[int, ...]  # every id that ends a generation, the main one first

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """Raises ModelLoadError for a file without a (consistent) vocabulary."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(gguf.strings("tokenizer.ggml.tokens"))]
    types = [int(kind) for kind in gguf.numbers("tokenizer.ggml.token_type")] or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelLoadError(f"{gguf.path.name}: {len(tokens)} tokens but {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        raise ModelLoadError(f"{gguf.path.name}: two tokens of the vocabulary share one text")
    sentencepiece = gguf.string("tokenizer.ggml.model") == "llama"
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}
    roles = {name: _role(gguf, name, defaults.get(name), len(tokens)) for name in _ROLES}
    for i, token in enumerate(tokens):
        if token in _END_TEXTS:
            types[i] = _CONTROL
    named = [roles["eos"], roles["eot"], roles["eom"], *(i for i, token in enumerate(tokens) if token in _END_TEXTS)]
    ends = tuple(dict.fromkeys(i for i in named if i is not None))
    return Vocabulary(tuple(tokens), tuple(types), roles["bos"], roles["eos"], roles["padding"], roles["unknown"], ends)


_ROLES = ("bos", "eos", "eot", "eom", "padding", "unknown")


def _role(gguf: GGUFFile, name: str, default: int | None, size: int) -> int | None:
    """The id of a role; one outside the vocabulary is ignored, as llama.cpp does."""
    token_id = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    return token_id if isinstance(token_id, int) and 0 <= token_id < size else None


def build_tokenizer(gguf: GGUFFile, vocabulary: Vocabulary) -> tuple[Tokenizer, dict[str, object]]:
    """The tokenizer and its tokenizer_config.json. Raises ModelLoadError for kinds that can't be built exactly."""
    kind = gguf.string("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(gguf, vocabulary)
        elif kind == "llama":
            tokenizer, add_bos = _sentencepiece(gguf, vocabulary), True
        else:
            raise ModelLoadError(f"{gguf.path.name}: tokenizers of kind {kind!r} are not supported; known: gpt2, llama")
        _add_special_tokens(tokenizer, gguf, vocabulary)
    except ModelLoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelLoadError(f"{gguf.path.name}: the tokenizer can't be built: {error}") from error
    add_bos = gguf.flag("tokenizer.ggml.add_bos_token", add_bos)
    add_eos = gguf.flag("tokenizer.ggml.add_eos_token", False)
    _set_post_processor(tokenizer, vocabulary, add_bos, add_eos)
    return tokenizer, _tokenizer_config(gguf, vocabulary, add_bos and vocabulary.bos is not None, add_eos)


def _byte_level(gguf: GGUFFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (GPT-2 and most models since)."""
    pre = find_pre_tokenizer(gguf.string("tokenizer.ggml.pre", "default"))
    merges = []
    for merge in gguf.strings("tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(gguf: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece BPE: neighbours merge by the score of the piece they make; unknown characters become bytes."""
    scores = gguf.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise ModelLoadError(f"{gguf.path.name}: the SentencePiece vocabulary has no scores")
    if vocabulary.types.count(_BYTE) < 256:
        raise ModelLoadError(f"{gguf.path.name}: a SentencePiece vocabulary without byte tokens is not supported")
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = _merges_by_score(vocabulary, scores)
    unknown = vocabulary.text(vocabulary.unknown)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = gguf.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two pieces, best score first; among equals, the cut with the lowest ids."""
    mergeable = (_CONTROL, _UNKNOWN, _BYTE)
    ids = {
        t: i
        for i, (t, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind not in mergeable
    }
    found: list[tuple[float, int, int, str, str]] = []
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _add_special_tokens(tokenizer: Tokenizer, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
    # Phi-3's tokens swallow the white space after them; GGUF cannot say so and llama.cpp goes by the name, too.
    strips = "phi-3" in (name := gguf.string("general.name", "").lower()) or "phi3" in name
    added = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            rstrip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
            special = kind != _USER_DEFINED
            added.append(AddedToken(token, special=special, normalized=False, rstrip=rstrip))
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(vocabulary.tokens):
        raise ModelLoadError(f"{gguf.path.name}: the special tokens do not fit the vocabulary")


def _set_post_processor(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> None:
    bos, eos = vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos)
    first, last = [bos] if add_bos and bos else [], [eos] if add_eos and eos else []
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)]
    if special:
        template = [*first, "$A", *last]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, *first, "$B", *last], special_tokens=special
        )


def _tokenizer_config(gguf: GGUFFile, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, object]:
    named: Mapping[str, int | None] = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.pad,
    }
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.integer(f"{gguf.architecture}.context_length"),
    }
    return config | {name: vocabulary.text(i) for name, i in named.items() if i is not None}
