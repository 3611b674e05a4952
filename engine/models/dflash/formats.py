"""Published checkpoint formats of DFlash drafts, read without any code of theirs, into one spec and one set of names.

z-lab's (`DFlashDraftModel`, and `DFlash2DraftModel` of arXiv 2602.06036's authors), the `speculators` library's, and
DSpark's (arXiv 2607.05147) with flat keys (DeepSpec) or nested ones (SpecForge).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ModelLoadError
from engine.models.dflash import checks, weights
from engine.models.dflash.attention_kinds import read_layers
from engine.models.dflash.spec import DFlashSpec
from engine.models.draft_files import BOOKKEEPING, Settings, TargetFacts, read_settings, read_tensors
from engine.models.draft_rope import read_rope

__all__ = ["TargetFacts", "load"]

# Keys of the draft itself; they stand at the top or in dflash_config, whichever its trainer liked.
_OWN = (
    *("block_size", "target_layer_ids", "mask_token_id", "mask_token", "num_target_layers", "draft_vocab_size"),
    *("output_multiplier", "logit_scale", "final_logit_softcapping", "input_embedding_scale", "sample_from_anchor"),
    *("projector_type", "shift_label", "causal", "use_swa", "swa_window_size", "target_hidden_size"),
    *("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    *("confidence_head_alpha", "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"),
    "use_aux_hidden_state",
)
# Said again by the heads' counts, about training, or about a format that is refused by name.
_HARMLESS = ("attention_mode", "confidence_head_alpha", "num_anchors")
_ZLAB, _ZLAB2, _DSPARK = "DFlashDraftModel", "DFlash2DraftModel", ("Qwen3DSparkModel", "DSparkDraftModel")
_REFUSED = {
    "DominoDraftModel": "Domino drafts (a GRU over the drafted prefix) are not supported",
    "Gemma4DSparkModel": "DSpark drafts for Gemma 4, whose layers are Gemma's own, are not supported",
    "LlamaForCausalLMEagle3": "this is an EAGLE-3 draft; use `drafter: eagle3`",
}
_DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


@dataclass(frozen=True, slots=True)
class _Format:
    """Where a checkpoint's keys are, and what its format takes for granted."""

    words: str
    network: Settings  # the transformer's keys
    own: Settings  # the draft's, on one level
    required: tuple[str, ...] = ()
    block_size: int | None = None
    anchor_predicts: bool = False
    taps_key: str = "target_layer_ids"
    taps_shift: int = 0  # of a written tap over a 0-based layer
    sliding_causal: bool | None = None  # said in the format's own way


def load(folder: Path, target: TargetFacts) -> tuple[DFlashSpec, dict[str, torch.Tensor], str]:
    """The draft in `folder` for `target`: spec, tensors (z-lab's names, dtypes as stored, on the CPU), format in words.

    Names and shapes are `weights.tensor_shapes(spec)`; `d2t` int64 [draft_vocab] holds ABSOLUTE target ids, and is
    there if and only if `draft_vocab_size < vocab_size`; without an own head the head is then the target's rows d2t.
    `mask_embedding` [D] may be there. Tap -1 is the embedding's output.
    Raises ModelLoadError that names the key or tensor at fault, and what was expected.
    """
    config = read_settings(folder)
    if (folder / "mask_embedding.pt").exists():
        raise ModelLoadError(f"{folder.name}: mask_embedding.pt is a pickle; store it as the tensor mask_embedding")
    spec, words, tied = read_config(config, target)
    spec, tensors = weights.canonical(read_tensors(folder), spec, tied, folder.name)
    checks.check_tensors(spec, tensors, folder.name)
    return spec, tensors, words


def read_config(config: Settings, target: TargetFacts) -> tuple[DFlashSpec, str, bool]:
    """What config.json alone says: spec (own embedding and head unknown), format in words, tie_word_embeddings.

    Raises ModelLoadError that names the key: wrong, missing, unknown, or at odds with the target.
    """
    kind = _recognise(config)
    spec = _read_spec(kind, target)
    tied = kind.network.flag("tie_word_embeddings")
    kind.network.refuse_unread()
    kind.own.refuse_unread(_HARMLESS)
    config.refuse_unread((*BOOKKEEPING, *_HARMLESS, *kind.network.seen))
    return spec, kind.words, tied


def _recognise(config: Settings) -> _Format:
    """The format, by what its config.json names itself. Raises ModelLoadError for others, with the known ones."""
    if config.raw("quantization_config"):
        raise ModelLoadError(f"{config.where}: quantization_config: the draft's weights must be in 16 or 32 bits")
    library = config.text("speculators_model_type", "")
    if library:
        return _speculators(config, library)
    names = config.texts("architectures")
    own = _one_level(config)
    projector = own.text("projector_type", "")
    for name in (*names, {"domino": "DominoDraftModel"}.get(projector, "")):
        if name in _REFUSED:
            raise ModelLoadError(f"{config.where}: {_REFUSED[name]}")
    name = names[0] if names else _ZLAB if "dflash_config" in config.values else ""
    if projector == "dspark" or name in _DSPARK:
        words = "DSpark, SpecForge's nesting" if projector else "DSpark, DeepSpec's flat keys"
        return _Format(words, config, own, anchor_predicts=True)
    if projector in ("", "dflash", "dflash2") and name == _ZLAB2:
        return _Format("z-lab DFlash2", config, own, required=_DFLASH2_KEYS)
    if projector in ("", "dflash") and name == _ZLAB:
        return _Format("z-lab DFlash", config, own, block_size=16)
    known = ", ".join((_ZLAB, _ZLAB2, *_DSPARK))
    raise ModelLoadError(
        f"{config.where}: architectures {list(names)} with projector_type {projector!r} is no known DFlash format; "
        f"known are {known}, and speculators_model_type dflash, dflash2 or dspark"
    )


def _one_level(config: Settings) -> Settings:
    """The draft's own keys, from the top and from dflash_config. Raises ModelLoadError where the two disagree."""
    nested = config.section("dflash_config")
    values = dict(nested.values)
    for key in _OWN:
        outer = config.raw(key)
        if outer is not None and values.get(key) not in (None, outer):
            raise ModelLoadError(f"{config.where}: {key} is {outer} at the top, but {values[key]} in dflash_config")
        if outer is not None:
            values[key] = outer
    return Settings(values, config.where)


def _speculators(config: Settings, library: str) -> _Format:
    """Taps count from 1 there (0 is the embedding), and the transformer has a section of its own."""
    if library not in ("dflash", "dflash2", "dspark"):
        raise ModelLoadError(
            f"{config.where}: speculators_model_type is {library!r}; a DFlash draft says dflash, dflash2 or dspark"
            + ("; use `drafter: eagle3`" if library == "eagle3" else "")
        )
    config.seen |= {"speculators_config", "speculators_version"}
    network = config.section("transformer_layer_config")
    rope = network.values.get("rope_parameters")
    if isinstance(rope, dict) and "sliding_attention" in rope:  # by layer type: the library takes this one for all
        network = Settings({**network.values, "rope_parameters": rope["sliding_attention"]}, network.where)
    causal = not config.flag("sliding_window_non_causal")
    values = {key: config.raw(key) for key in _OWN}
    values["target_layer_ids"] = [index - 1 for index in config.integers("aux_hidden_state_layer_ids")]
    common = {"taps_key": "aux_hidden_state_layer_ids", "taps_shift": 1}
    return _Format(
        f"speculators {library}",
        network,
        Settings(values, config.where),
        required=_DFLASH2_KEYS if library == "dflash2" else (),
        block_size=8,
        anchor_predicts=library == "dspark",
        sliding_causal=causal,
        **common,  # type: ignore[arg-type]
    )


def _read_spec(kind: _Format, target: TargetFacts) -> DFlashSpec:
    """The spec, checked against itself and the target; own embedding and head are left for the tensors to tell."""
    network, own = kind.network, kind.own
    for key in kind.required:
        own.integer(key)
    heads, width = network.integer("num_attention_heads"), network.integer("hidden_size")
    head_dim = (
        128 if network.text("model_type", "qwen3") == "qwen3" else width // max(heads, 1)
    )  # transformers' default
    taps = own.integers("target_layer_ids")
    rank = own.integer("markov_rank", 0)
    spec = DFlashSpec(
        hidden_size=width,
        intermediate_size=network.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=network.integer("num_key_value_heads", heads),
        head_dim=network.integer("head_dim", head_dim),
        layers=read_layers(network, own, kind.sliding_causal),
        taps=taps,
        block_size=own.integer("block_size", kind.block_size),
        mask_token_id=_mask(own, target),
        vocab_size=network.integer("vocab_size"),
        draft_vocab_size=own.integer("draft_vocab_size", network.integer("vocab_size")),
        rms_norm_eps=network.number("rms_norm_eps", 1e-6),
        hidden_act=network.text("hidden_act", "silu"),
        rope=read_rope(network),
        max_position_embeddings=network.integer("max_position_embeddings", 0),
        attention_bias=network.flag("attention_bias"),
        anchor_predicts=own.flag("sample_from_anchor", kind.anchor_predicts),
        embedding_scale=own.number("input_embedding_scale", 1.0),
        logit_scale=own.number("output_multiplier", 1.0) * own.number("logit_scale", 1.0),
        logit_softcap=own.number("final_logit_softcapping", 0.0) or None,
        markov_rank=rank,
        confidence_head=own.flag("enable_confidence_head", own.number("confidence_head_alpha", 0.0) > 0),
        confidence_with_markov=own.flag("confidence_head_with_markov"),
        conv_kernel=own.integer("conv_kernel_size", 0),
        conv_group=own.integer("conv_group_size", 16),
        selector_rank=own.integer("selector_rank", 0),
        selector_top_k=own.integer("selector_top_k", 0),
    )
    _refuse_variants(own, rank)
    checks.check_target(spec, target, _optional(own, "num_target_layers"), own.where)
    checks.check_taps(taps, target, kind.taps_key, kind.taps_shift, own.where)
    checks.check_shape(spec, network.where)
    reads = _optional(own, "target_hidden_size")
    if reads not in (None, target.hidden_size):
        raise own.wrong("target_hidden_size", f"the target's, {target.hidden_size}")
    return spec


def _mask(own: Settings, target: TargetFacts) -> int:
    text = own.text("mask_token", "") or None
    return checks.find_mask(text, _optional(own, "mask_token_id"), target, own.where)


def _optional(own: Settings, key: str) -> int | None:
    return None if own.raw(key) is None else own.integer(key)


def _refuse_variants(own: Settings, markov_rank: int) -> None:
    """Heads and features of other kinds than those served. Raises ModelLoadError."""
    if markov_rank and (head := own.text("markov_head_type", "vanilla").lower()) != "vanilla":
        raise ModelLoadError(f"{own.where}: markov_head_type {head!r} is not supported, only 'vanilla'")
    if own.flag("shift_label"):
        raise own.wrong("shift_label", "false: only Domino drafts shift their labels, and they are not supported")
    if not own.flag("use_aux_hidden_state", True):
        raise own.wrong("use_aux_hidden_state", "true: a draft without the target's states is no DFlash draft")
