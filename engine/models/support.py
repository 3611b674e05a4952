"""Which models the adapter can serve: what a configuration, or a look at a finished model, already rules out.

Every refusal names its cause. What none of this foresees is left to the numerical self-check (`models/selfcheck.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from engine.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.models.stored_model import StoredConfig

SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})
_RECURRENT = "recurrent layers (state-space or linear attention), whose state is no list of keys and values"
_LAYERS = {
    "linear_attention": _RECURRENT,
    "mamba": _RECURRENT,
    "recurrent": _RECURRENT,
    "hybrid": "layers that join attention with a recurrent state",
    "hybrid_sliding": "layers that join attention with a recurrent state",
    "conv": "convolution layers, which mix neighbouring tokens outside attention",
    "chunked_attention": "chunked attention, whose mask restarts at every chunk",
    "indexed_attention": "sparse attention, whose keys an indexer picks for each query",
    "minimax_m3_sparse": "sparse attention, whose keys an indexer picks for each query",
    "compressed_sparse_attention": "attention over compressed keys and values",
    "heavily_compressed_attention": "attention over compressed keys and values",
}


def text_config(config: PretrainedConfig | StoredConfig) -> PretrainedConfig:
    """The decoder's part of a configuration. Raises ModelLoadError where there are several."""
    try:
        return cast("PretrainedConfig", config.get_text_config())
    except ValueError as error:
        raise ModelLoadError(f"{config.model_type}: it holds several language models; none can be served") from error


def check_supported(config: PretrainedConfig) -> None:
    """Refuse, from the configuration alone, what this adapter can't serve. Raises ModelLoadError with the reason."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # the rest of this module is asked where it was never imported

    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelLoadError(
            f"{config.model_type}: its weights are quantised ({method}), which can't be served; "
            "use a checkpoint in 16 or 32 bits"
        )
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{config.model_type}: an encoder-decoder model; only decoders can be served")
    text = text_config(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        inner = ""
        if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            inner = f"; the {text.model_type} model inside could, from a checkpoint of its own"
        raise ModelLoadError(
            f"{config.model_type}: transformers has no causal language model of this kind (it is an encoder, or works "
            f"on images or sound); only decoders of text can be served{inner}"
        )
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - SERVED_LAYERS)
    if unknown:
        reasons = "; ".join(dict.fromkeys(_LAYERS.get(kind, f"layers of type {kind}") for kind in unknown))
        raise ModelLoadError(f"{config.model_type}: it has {reasons} ({', '.join(unknown)}), which can't be served")
    if getattr(text, "num_kv_shared_layers", None):
        raise ModelLoadError(
            f"{config.model_type}: some layers read the keys and values of others, which can't be served"
        )
    if getattr(text, "attn_temperature_tuning", None):
        raise ModelLoadError(
            f"{config.model_type}: it scales attention by a token's row in a pass instead of its position "
            "(attn_temperature_tuning), which can't be served in batches"
        )


def why_not_paged(model: PreTrainedModel, calls: list[int], layers: int) -> str | None:
    """The reason why a model whose pass called attention in the layers `calls` can't be paged, or None if it can."""
    if sorted(calls) == list(range(layers)):
        return None
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state instead of keys and values"
    if not calls:
        return "it computes attention inside its own layers, not through the attention interface of transformers"
    if len(set(calls)) < len(calls):
        return "it runs attention more than once in a layer (shared, crossed or differential attention)"
    return f"{len(calls)} of {layers} layers called attention; recurrent, shared or hybrid layers can't be paged"


def context_length(config: PretrainedConfig | StoredConfig) -> int:
    """Tokens that one sequence may have.

    `longrope` models get their original context: `transformers` switches them from short to long factors for a whole
    forward pass when any position in it is past that, so a request's tokens would depend on which other requests
    run beside it. `dynamic` scaling, which has the same flaw, starts past `max_position_embeddings`: never here.
    """
    text = text_config(config)
    lengths = [int(getattr(text, "max_position_embeddings", None) or 2048)]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            original = part.get("original_max_position_embeddings")
            lengths.append(int(original or getattr(text, "original_max_position_embeddings", None) or lengths[0]))
    return min(lengths)


def has_experts(config: PretrainedConfig) -> bool:
    """Whether routers send each token to some of many experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    text = text_config(config)
    # DBRX has a configuration of their own for its MLPs.
    parts = [text, *(value for value in vars(text).values() if hasattr(value, "model_type"))]
    return any((getattr(part, name, None) or 0) > 1 for part in parts for name in names)
