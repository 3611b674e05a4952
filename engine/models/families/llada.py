"""LLaDA-8B and its successors: a Llama without a causal mask, under OLMo's names (reference: GSAI-ML's checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import LlamaConfig, PretrainedConfig

from engine.errors import ModelLoadError

# Regular expression -> replacement, applied one after another; some exports leave the first `model.` out.
NAMES = {
    r"^(model\.)?transformer\.wte\.": "model.embed_tokens.",
    r"^(model\.)?transformer\.ln_f\.": "model.norm.",
    r"^(model\.)?transformer\.ff_out\.": "lm_head.",
    r"^(model\.)?transformer\.blocks\.": "model.layers.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ff_norm\.": ".post_attention_layernorm.",
    r"\.q_proj\.": ".self_attn.q_proj.",
    r"\.k_proj\.": ".self_attn.k_proj.",
    r"\.v_proj\.": ".self_attn.v_proj.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",  # silu is applied to this one
    r"\.up_proj\.": ".mlp.up_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",
}
# What a plain Llama has not: key -> the only values that mean it is not asked for. A missing key is None.
_PLAIN: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu", None),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "scale_logits": (False, None),
}


def llada_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """A Llama's configuration. Raises ModelLoadError, by name, for what a plain one has not, and for missing sizes."""
    for key, plain in _PLAIN.items():
        if raw.get(key) not in plain:
            raise ModelLoadError(
                f"llada: config.json has {key}: {raw.get(key)!r}, and only {plain[0]!r} can be served "
                "(a plain Llama without a causal mask)"
            )
    width, heads = _size(raw, "d_model"), _size(raw, "n_heads")
    kv_heads = raw.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if raw.get("multi_query_attention") else heads
    sizes = {
        "vocab_size": raw.get("embedding_size") or _size(raw, "vocab_size"),
        "hidden_size": width,
        "intermediate_size": _size(raw, "mlp_hidden_size"),
        "num_hidden_layers": _size(raw, "n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": _size(raw, "max_sequence_length"),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "rope_theta": raw.get("rope_theta", 10000.0),
        "tie_word_embeddings": bool(raw.get("weight_tying", True)),
        "dtype": raw.get("torch_dtype") or raw.get("dtype"),
    }
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaConfig.from_dict(sizes | ids)


def _size(raw: Mapping[str, object], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise ModelLoadError(f"llada: config.json: {key} must be a whole number above 0, not {value!r}")
    return value
