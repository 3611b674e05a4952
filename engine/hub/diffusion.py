"""Which checkpoints are masked-diffusion models, and what each was trained for. No torch: the front process asks too.

Read are config.json, generation_config.json and the tokenizer's files, never code. Keys of config.json that say it
outright, in any checkpoint and before all else: `mask_token_id` (int), `diffusion_attention` ("full" or
"block_causal"), `block_size` (tokens) and `shift_logits` (bool); this project's own checkpoints have all four.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import DiffusionConfig, ModelConfig
from engine.diffusion import BLOCK_CAUSAL, CACHES, FULL, DiffusionSpec
from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)

PIPELINES = ("masked_diffusion", "dual_diffusion")
_STOPS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|role_end|>",
)  # end a turn of a chat; eos_token_id ends the text as it does everywhere
_BLOCK_KEYS = ("block_size", "bd_size", "block_length")
_UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class _Form:
    """A published form. `spec.attention` is empty, or its block length _UNKNOWN, where each checkpoint has its own."""

    spec: DiffusionSpec
    mask_text: str  # of the mask token, where config.json does not give its id
    mask_id: int = -1  # where it stands in the published code alone


def _form(text: str, attention: str, block: int = 32, mask_id: int = -1, **rest: object) -> _Form:
    return _Form(replace(DiffusionSpec(attention, 0, block), **rest), text, mask_id)  # type: ignore[arg-type]


_LLADA_MOE = _form("<|mask|>", FULL, family="LLaDA-MoE")
_SDAR_MOE = _form("<|MASK|>", BLOCK_CAUSAL, _UNKNOWN, rule="dynamic", family="SDAR-MoE")
_A2D = _form("<|mask|>", "", family="dllm a2d")
_BY_TYPE = {
    "llada": _form("<|mdm_mask|>", FULL, family="LLaDA"),
    "dream": _form("<|mask|>", FULL, shift=True, tempered=True, dream_schedule=True, family="Dream"),
    "fast_dllm_qwen": _form("|<MASK>|", BLOCK_CAUSAL, sub_block=8, shift=True, tempered=True, family="Fast-dLLM v2"),
    "sdar": _form("<|MASK|>", BLOCK_CAUSAL, _UNKNOWN, rule="dynamic", family="SDAR"),
    "sdar_moe": _SDAR_MOE,
    "lladamoe": _LLADA_MOE,
    "llada_moe": _LLADA_MOE,
    **dict.fromkeys(("a2d-llama", "a2d-qwen2", "a2d-qwen3"), _A2D),
}
_BY_ARCHITECTURE = {
    # Its code alone says 5 and 4, as defaults of `generate_block`.
    "stablediffcoderforcausallm": _form("", BLOCK_CAUSAL, 4, mask_id=5, family="Stable-DiffCoder"),
    "lladamoemodellm": _LLADA_MOE,
    "lladamoemodel": _LLADA_MOE,
    "sdarmoeforcausallm": _SDAR_MOE,
}
_PLAIN = _form("<|mask|>", "", _UNKNOWN, family="masked diffusion")

_EXPERTS = (
    "it has expert layers of a form of its own (groups of experts, biased scores, shared ones, and queries, keys and "
    "values in one matrix), which are not built here"
)
_DIT = "its network is told the time of each step (adaptive norms), and is no decoder with a mask token"
_OTHER = "this kind of diffusion model is not built here"
_REFUSED = {
    "llada2_moe": _EXPERTS,
    "llada2moe": _EXPERTS,
    "mdlm": _DIT,
    "bd3lm": _DIT,
    "dit": _DIT,
    "sedd": _DIT,
    "diffusion_gemma": _OTHER,
    "nemotron_labs_diffusion": _OTHER,
}


def find_spec(folder: Path, config: DiffusionConfig | None = None) -> DiffusionSpec | None:
    """What the checkpoint of a folder was trained for; None for an autoregressive one.

    `config` comes before what the checkpoint says, but for a block length that it was trained with. With
    `config.attention` any decoder is taken for a diffusion model. Raises ModelLoadError for a diffusion model that
    can't be served, or does not say what must be known; the message names the setting that would help.
    """
    raw = _read(folder, "config.json")
    form = _find_form(folder, raw, config)
    if form is None:
        return None
    given = config or DiffusionConfig()
    attention = given.attention or _said_attention(folder, raw, form)
    spec = replace(
        form.spec,
        attention=attention,
        mask_id=_mask_id(folder, raw, form, given),
        shift=_shift(folder, raw, form, given),
    )
    spec = replace(spec, block_length=_block_length(folder, raw, spec, given))
    parts = spec.block_causal and spec.sub_block < spec.block_length and spec.block_length % (spec.sub_block or 1) == 0
    tokens = _tokens(folder)
    stops = tuple(tokens[text] for text in _STOPS if text in tokens)
    return replace(spec, stop_ids=stops, sub_block=spec.sub_block if parts else 0)


def settle_pipeline(config: ModelConfig, spec: DiffusionSpec | None) -> ModelConfig:
    """The configuration with a pipeline for this checkpoint: a diffusion model has no other than those that denoise.

    Raises ModelLoadError where another one was asked for.
    """
    if spec is None:
        if config.pipeline in PIPELINES:
            raise ModelLoadError(
                f"models.pipeline: {config.pipeline} serves masked-diffusion models, and {config.name} does not say "
                "that it is one; use pipeline: autoregressive, or, if it is one, set diffusion.attention and "
                "diffusion.mask_id"
            )
        return config
    if config.pipeline in PIPELINES:
        return config
    if config.pipeline != "autoregressive" or config.draft is not None:
        raise ModelLoadError(
            f"models.pipeline: {config.name} is a masked-diffusion model ({spec.family}), which drafts can't speed up; "
            "use pipeline: masked_diffusion or dual_diffusion, and no draft"
        )
    logger.info("%s is a masked-diffusion model (%s): pipeline masked_diffusion", config.name, spec.family)
    return replace(config, pipeline="masked_diffusion")


def _find_form(folder: Path, raw: Mapping[str, object], config: DiffusionConfig | None) -> _Form | None:
    """The published form of this checkpoint; None for an autoregressive one."""
    kind = str(raw.get("model_type", "")).lower()
    listed = raw.get("architectures")
    names = [str(name).lower() for name in listed] if isinstance(listed, list) else []
    heads = [name.removesuffix("forcausallm").removesuffix("modellm").removesuffix("lm") for name in names]
    for name in (kind, *names, *heads):
        if name in _REFUSED:
            raise ModelLoadError(f"{folder.name} ({kind or name}): {_REFUSED[name]}")
    form = next((_BY_ARCHITECTURE[name] for name in names if name in _BY_ARCHITECTURE), None) or _BY_TYPE.get(kind)
    said = raw.get("diffusion_attention") is not None or (config is not None and bool(config.attention))
    return form or (_PLAIN if said else None)


def _said_attention(folder: Path, raw: Mapping[str, object], form: _Form) -> str:
    said = raw.get("diffusion_attention")
    if said is not None:
        if said not in CACHES:
            raise ModelLoadError(f"{folder.name}: config.json: diffusion_attention must be one of {', '.join(CACHES)}")
        return str(said)
    if form.spec.attention:
        return form.spec.attention
    # dllm publishes both under one model_type; the checkpoint's name is all that tells them apart.
    cached = folder.parts[-3] if folder.parent.name == "snapshots" else ""  # as the hub's library lays them out
    names = " ".join((str(raw.get("_name_or_path", "")), cached, folder.name)).lower()
    full, block = "mdlm" in names, "bd3lm" in names
    if full != block:
        return FULL if full else BLOCK_CAUSAL
    raise ModelLoadError(
        f"{folder.name} ({form.spec.family}): its config.json does not say which tokens see which; set "
        "diffusion.attention to full (dllm's mdlm) or block_causal (its bd3lm)"
    )


def _shift(folder: Path, raw: Mapping[str, object], form: _Form, given: DiffusionConfig) -> bool:
    said = raw.get("shift_logits", form.spec.shift)
    if not isinstance(said, bool):
        raise ModelLoadError(f"{folder.name}: config.json: shift_logits must be true or false")
    return said if given.shift is None else given.shift


def _mask_id(folder: Path, raw: Mapping[str, object], form: _Form, given: DiffusionConfig) -> int:
    # A padded embedding is larger than the vocabulary that LLaDA's vocab_size counts.
    size = max(_number(raw.get("vocab_size")), _number(raw.get("embedding_size")))
    found = given.mask_id
    where = "diffusion.mask_id" if found is not None else "its mask token"
    for values in (raw, {} if found is not None else _read(folder, "generation_config.json")):
        if found is None and type(said := values.get("mask_token_id")) is int:
            found = said
    if found is None:
        tokens, named = _tokens(folder), _text(_read(folder, "tokenizer_config.json").get("mask_token"))
        found = form.mask_id if form.mask_id >= 0 else tokens.get(named or "", tokens.get(form.mask_text, -1))
    if found < 0 and given.mask_id is None:
        raise ModelLoadError(
            f"{folder.name} ({form.spec.family}): neither its config.json nor its tokenizer says which token is the "
            "mask; set diffusion.mask_id"
        )
    if not 0 <= found < (size or found + 1):
        raise ModelLoadError(f"{folder.name}: {where} has the id {found}, and there are {size} ids")
    return found


def _block_length(folder: Path, raw: Mapping[str, object], spec: DiffusionSpec, given: DiffusionConfig) -> int:
    said = next((_number(raw[key]) for key in _BLOCK_KEYS if _number(raw.get(key)) > 0), 0)
    own = said or spec.block_length
    wished = given.block_length or 0
    if not spec.block_causal:
        return wished or own or 32
    if wished and said and wished != said:
        raise ModelLoadError(
            f"diffusion.block_length: {folder.name} was trained with blocks of {said} tokens, not {wished}"
        )
    if not (wished or own):
        raise ModelLoadError(
            f"{folder.name} ({spec.family}): its config.json does not say how long its blocks are (block_size); "
            "set diffusion.block_length to what it was trained with"
        )
    return wished or own


def _tokens(folder: Path) -> dict[str, int]:
    """Ids of the added tokens by their text. tokenizer.json, which is large, is read only where no small file tells."""
    found: dict[str, int] = {}
    listed = _read(folder, "tokenizer_config.json").get("added_tokens_decoder")
    for token_id, entry in listed.items() if isinstance(listed, dict) else ():
        if str(token_id).isdecimal() and (text := _text(entry)) is not None:
            found[text] = int(token_id)
    found |= {text: token_id for text, token_id in _read(folder, "added_tokens.json").items() if type(token_id) is int}
    if not found:
        entries = _read(folder, "tokenizer.json").get("added_tokens")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and type(entry.get("id")) is int and (text := _text(entry)) is not None:
                found[text] = entry["id"]
    return found


def _read(folder: Path, name: str) -> dict[str, object]:
    """The object in a file; empty if there is no such file. Raises ModelLoadError for any other content."""
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{folder.name}: {name} can't be read: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{folder.name}: {name} must hold an object")
    return values


def _text(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _number(value: object) -> int:
    return value if type(value) is int else 0
