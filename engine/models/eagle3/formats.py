"""Published checkpoint formats of EAGLE-3 drafts, read without any code of theirs: one spec and one dict of tensors.

Two layouts: the original one (SafeAILab and SpecForge: `LlamaForCausalLMEagle3`, one flat configuration, tensors under
`midlayer.`), and that of the `speculators` library (the layer's configuration in `transformer_layer_config`, tensors
under `layers.0.`). Both name tapped layers by the stream that ENTERS them: id i is the output of layer i - 1.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import ModelLoadError
from engine.models.draft_files import BOOKKEEPING, Settings, TargetFacts, read_settings, read_tensors
from engine.models.draft_rope import read_rope
from engine.models.eagle3.spec import Eagle3Spec
from engine.models.eagle3.tensors import check_numbers, checked

ORIGINAL = "LlamaForCausalLMEagle3"
# Further keys that say nothing about what one pass computes; those read only under some conditions are among them.
_HARMLESS = BOOKKEEPING | {
    *("eagle_config", "embed_requires_grad", "is_causal", "layer_types", "max_window_layers", "sliding_window"),
    *("speculators_config", "speculators_version", "target_model_type", "use_sliding_window"),
}


def load(folder: Path, target: TargetFacts) -> tuple[Eagle3Spec, dict[str, torch.Tensor], str]:
    """The draft in `folder` for `target`: spec, tensors (dtypes as stored, on the CPU), format in words.

    Names: `layers.0.{input_layernorm,hidden_norm,post_attention_layernorm}.weight` [D],
    `layers.0.self_attn.{q,k,v}_proj.weight` [.., 2 * D], `layers.0.self_attn.o_proj.weight`,
    `layers.0.mlp.{gate,up,down}_proj.weight`, `fc.weight` [D, taps * target's D], `norm.weight` [D]. Where the spec
    says so also `input_norm.weight` [taps * target's D], `fc_norm.{i}.weight`, biases, `embed_tokens.weight` [V, D] and
    `lm_head.weight` [draft vocabulary, D]; and `d2t` int64 [draft vocabulary], as ABSOLUTE ids of the target.
    Raises ModelLoadError that names the key or tensor at fault, and what was expected.
    """
    settings = read_settings(folder)
    kind = settings.raw("speculators_model_type")
    names = settings.raw("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "nothing"
    if kind is not None:
        if kind != "eagle3":
            raise settings.wrong("speculators_model_type", "eagle3 for the drafter eagle3")
        spec, words = _speculators(settings, target), "speculators EAGLE-3"
    elif name == ORIGINAL:
        spec, words = _original(settings, target), "EAGLE-3"
    else:
        raise ModelLoadError(
            f"{settings.where}: architectures names {name}; an EAGLE-3 draft has {ORIGINAL}, or speculators_model_type "
            "eagle3"
        )
    check_numbers(settings.where, spec)
    spec, tensors = checked(folder.name, read_tensors(folder), spec)
    return spec, tensors, words


def _speculators(config: Settings, target: TargetFacts) -> Eagle3Spec:
    layer = config.section("transformer_layer_config")
    if not layer.values:
        raise config.wrong("transformer_layer_config", "the configuration of the draft's layer")
    methods = config.section("speculators_config").raw("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    most = Settings(first, f"{config.where}: proposal_methods").integer("speculative_tokens", 5)
    taps = _taps(config, config.raw("eagle_aux_hidden_state_layer_ids"), target)
    spec = _spec(config, layer, config, target, taps, most)
    config.refuse_unread(_HARMLESS)
    layer.refuse_unread(_HARMLESS)
    return spec


def _original(config: Settings, target: TargetFacts) -> Eagle3Spec:
    """Taps, and by some trainers variants, stand in a section of their own, or beside everything else."""
    own = config.section("eagle_config")
    if not own.flag("use_aux_hidden_state", True):
        raise ModelLoadError(f"{own.where}: use_aux_hidden_state is false: that is EAGLE 1 or 2, not EAGLE-3")
    key = "eagle_aux_hidden_state_layer_ids"
    chosen, ids = own if own.raw(key) is not None else config, own.raw(key) or config.raw(key)
    most = config.integer("num_speculative_tokens", 5)
    spec = _spec(config, config, own, target, _taps(chosen, ids, target), most)
    config.refuse_unread(_HARMLESS)
    own.refuse_unread(_HARMLESS)
    return spec


def _spec(
    config: Settings, layer: Settings, own: Settings, target: TargetFacts, taps: tuple[int, ...], most: int
) -> Eagle3Spec:
    """`config` holds what concerns the draft as a whole, `layer` what any decoder has, `own` variants."""

    def variant(name: str) -> bool:
        return own.flag(name, config.flag(name))

    width, heads = layer.integer("hidden_size"), layer.integer("num_attention_heads")
    if heads < 1:
        raise layer.wrong("num_attention_heads", "above 0")
    _agree(layer, "num_hidden_layers", layer.integer("num_hidden_layers", 1), 1, "an EAGLE-3 draft has one layer")
    _agree(layer, "vocab_size", layer.integer("vocab_size"), target.vocab_size, "the target's vocabulary")
    seen = config.integer("target_hidden_size", width)
    _agree(config, "target_hidden_size", seen, target.hidden_size, "the target's hidden size")
    _agree(config, "num_aux_hidden_states", config.integer("num_aux_hidden_states", len(taps)), len(taps), "the taps")
    _agree(config, "logit_scale", config.number("logit_scale", 1.0), 1.0, "scaled logits can't be served")
    return Eagle3Spec(
        hidden_size=width,
        target_hidden_size=target.hidden_size,
        intermediate_size=layer.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=layer.integer("num_key_value_heads", heads),
        head_dim=layer.integer("head_dim", width // heads),
        taps=taps,
        vocab_size=target.vocab_size,
        draft_vocab_size=config.integer("draft_vocab_size", target.vocab_size),
        most=most,
        rms_norm_eps=layer.number("rms_norm_eps", 1e-6),
        hidden_act=layer.text("hidden_act", "silu"),
        rope=read_rope(layer),
        max_position_embeddings=layer.integer("max_position_embeddings", 0),
        window=_window(layer),
        attention_bias=layer.flag("attention_bias"),
        mlp_bias=layer.flag("mlp_bias"),
        own_head=not (config.flag("tie_word_embeddings") or layer.flag("tie_word_embeddings")),
        norm_before_residual=variant("norm_before_residual"),
        norm_before_fc=variant("norm_before_fc"),
        fc_norm=variant("fc_norm"),
        norm_output=variant("norm_output"),
    )


def _agree(settings: Settings, key: str, found: float, wanted: float, why: str) -> None:
    if found != wanted:
        raise ModelLoadError(f"{settings.where}: {key} is {found:g}, but must be {wanted:g} ({why})")


def _taps(config: Settings, ids: object, target: TargetFacts) -> tuple[int, ...]:
    """Layers whose output is read; without a list, the family's default."""
    key = "eagle_aux_hidden_state_layer_ids"
    layers = target.num_layers
    if ids is None:
        ids = [2, layers // 2, layers - 3]
    if not isinstance(ids, list) or not ids or any(type(item) is not int for item in ids):
        raise ModelLoadError(f"{config.where}: {key} must be a list of integers, but it is {str(ids)[:80]!r}")
    outside = [item for item in ids if not 1 <= item <= layers]
    if outside:
        raise ModelLoadError(
            f"{config.where}: {key} names {outside[0]}, which is not in 1 to {layers} (the target's layers; "
            "id i is the output of layer i - 1)"
        )
    return tuple(item - 1 for item in ids)


def _window(layer: Settings) -> int | None:
    kinds = layer.raw("layer_types")
    if isinstance(kinds, list) and kinds[:1] == ["sliding_attention"]:
        return layer.integer("sliding_window")
    if kinds is None and layer.flag("use_sliding_window"):
        raise layer.wrong("layer_types", "there where use_sliding_window is on")
    return None
