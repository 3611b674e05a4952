"""What loaders of draft checkpoints share: the target's facts, a reader of config.json, safetensors, d2t maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelLoadError
from engine.hub.resolve import validate_folder
from engine.models.draft_rope import Rope, freeze_rope
from engine.models.support import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys that `transformers` and trainers leave in a config.json and that say nothing about a draft's forward pass.
_BOOKKEEPING = (
    "_attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label "
    "initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type "
    "no_repeat_ngram_size num_anchors num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens "
    "target_model_name_or_path task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p "
    "use_bfloat16 use_cache"
)
BOOKKEEPING = frozenset(_BOOKKEEPING.split())


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a draft must agree with. `vocab_size` counts the rows of the embedding table, padding included."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tied_embeddings: bool
    rope: Rope
    folder: Path | None = None  # where its tokenizer.json is, if known

    @classmethod
    def of(cls, config: PretrainedConfig, folder: Path | None = None) -> Self:
        """From a `transformers` configuration. Raises ModelLoadError where it holds several language models."""
        text = text_config(config)
        heads = int(text.num_attention_heads)
        return cls(
            model_type=str(text.model_type),
            hidden_size=int(text.hidden_size),
            num_layers=int(text.num_hidden_layers),
            vocab_size=int(text.vocab_size),
            num_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            max_position_embeddings=int(getattr(text, "max_position_embeddings", None) or 0),
            tied_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
            rope=freeze_rope(getattr(text, "rope_parameters", None) or {}),
            folder=folder,
        )


class Settings:
    """Typed reading of one JSON object, with errors that name the key; it remembers what was read."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where  # for errors, e.g. "my-draft: config.json: dflash_config"
        self.seen: set[str] = set()

    def raw(self, key: str) -> object:
        """The value as JSON gave it; None if absent or null."""
        self.seen.add(key)
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises ModelLoadError for anything else, and for a missing key without a default."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self.wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises as `integer` does."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list with at least one integer."""
        value = self.raw(key)
        if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
            raise self.wrong(key, "a list of integers")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if absent."""
        value = self.raw(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def section(self, key: str) -> Settings:
        """A nested object; empty if absent."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(value or {}, f"{self.where}: {key}")

    def wrong(self, key: str, wanted: str) -> ModelLoadError:
        """The error of a key whose value is not `wanted`."""
        value = self.values.get(key)
        found = "is missing" if value is None else f"is {json.dumps(value)[:80]}"
        return ModelLoadError(f"{self.where}: {key} {found}; it must be {wanted}")

    def refuse_unread(self, harmless: Iterable[str] = BOOKKEEPING) -> None:
        """Raise ModelLoadError for keys that nobody read, but for `harmless` and switched off ones (null, false, 0)."""
        ignored = self.seen | set(harmless)
        unread = sorted(key for key, value in self.values.items() if key not in ignored and value)
        if unread:
            raise ModelLoadError(
                f"{self.where}: {', '.join(unread[:5])}: unknown here, and may change what the draft computes"
            )


def read_settings(folder: Path) -> Settings:
    """config.json of a draft. Raises ModelLoadError for a folder without one, pickles, or broken safetensors."""
    validate_folder(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{folder.name}: no usable config.json: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{folder.name}: config.json must hold an object")
    return Settings(values, f"{folder.name}: config.json")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder that `read_settings` has accepted, in one file or in shards, on the CPU as stored."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise ModelLoadError(f"{folder.name}: {name} can't be read: {error}") from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise ModelLoadError(f"{folder.name}: the tensor {twice[0]} stands in several shards")
        tensors |= found
    return tensors


def absolute_ids(d2t: torch.Tensor, t2d: torch.Tensor | None, vocab_size: int, where: str) -> torch.Tensor:
    """Target ids int64 [draft_vocab], ascending, from stored OFFSETS: id = i + d2t[i].

    `t2d` [vocab_size] says which ids these are, where it was stored too. Raises ModelLoadError for a map that is no
    list of ascending ids below `vocab_size`, or that `t2d` contradicts.
    """
    if d2t.dim() != 1 or d2t.is_floating_point() or d2t.is_complex() or d2t.dtype == torch.bool:
        raise ModelLoadError(f"{where}: d2t is {d2t.dtype} {list(d2t.shape)}; it must be integers [draft vocabulary]")
    ids = d2t.long() + torch.arange(len(d2t))
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ModelLoadError(
            f"{where}: d2t leads to ids outside the target's vocabulary of {vocab_size}; it must hold offsets "
            "(target id minus draft id), not ids"
        )
    if bool((ids[1:] <= ids[:-1]).any()):
        raise ModelLoadError(
            f"{where}: d2t leads to ids that do not ascend; two draft tokens may share one, or ids "
            "stand where offsets belong"
        )
    if t2d is not None:
        kept = torch.zeros(vocab_size, dtype=torch.bool)
        kept[ids] = True
        if t2d.shape != kept.shape or not torch.equal(t2d.bool(), kept):
            raise ModelLoadError(f"{where}: t2d does not mark the {len(ids)} target tokens that d2t leads to")
    return ids


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ModelLoadError that names a tensor with NaN or infinity, or of a type that is neither float nor integer."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float32).isfinite()):
            raise ModelLoadError(f"{where}: {name} holds NaN or infinite values")
