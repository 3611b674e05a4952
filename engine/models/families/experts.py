"""LLaDA-MoE and SDAR-MoE: the decoder of Qwen3-MoE, whose router weighs experts as theirs do."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, Qwen3MoeConfig

from engine.errors import ModelLoadError
from engine.models.families.renamed import plain_attention

# As in families/llada.py: key -> the only values that mean it is not asked for. A missing key is None.
_PLAIN: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "partial_rotary_factor": (1, None, -1),
    "qk_layernorm": (True,),
    "shared_expert_intermediate_size": (None,),
}


def sdar_moe_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """SDAR-MoE: all keys are Qwen3-MoE's."""
    return Qwen3MoeConfig.from_dict(plain_attention(raw))


def llada_moe_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """LLaDA-MoE: a softmax over all experts, the best of them with their weights as they are (never rescaled).

    Raises ModelLoadError, by name, for what Qwen3-MoE's layers have not.
    """
    for key, plain in _PLAIN.items():
        if raw.get(key) not in plain:
            raise ModelLoadError(
                f"llada_moe: config.json has {key}: {raw.get(key)!r}, and only {plain[0]!r} can be served "
                "(the expert layers of Qwen3-MoE)"
            )
    width, heads, sparse = raw.get("hidden_size"), raw.get("num_attention_heads"), raw.get("moe_layer_freq")
    if not (type(width) is int and type(heads) is int and heads > 0 and isinstance(sparse, list)):
        raise ModelLoadError("llada_moe: config.json lacks hidden_size, num_attention_heads or moe_layer_freq")
    named = {
        "head_dim": width // heads,
        "intermediate_size": raw.get("dense_intermediate_size"),
        "moe_intermediate_size": raw.get("expert_intermediate_size"),
        "mlp_only_layers": [layer for layer, routed in enumerate(sparse) if not routed],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
    }
    kept = {key: value for key, value in raw.items() if key not in _PLAIN}
    return Qwen3MoeConfig.from_dict(plain_attention(kept | named))
