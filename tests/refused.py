"""Models that can't be served, as tiny configurations, and what the refusal must say. README.md lists exactly these."""

from __future__ import annotations

from collections.abc import Mapping

from tests.families import LAYERS, VOCAB, Family

_INLINE = "computes attention inside its own layers"
_LATER = r"attends to later tokens \(an encoder\)"
_NOT_TEXT = "transformers has no causal language model of this kind"
_RECURRENT = "recurrent layers"
_TWICE = "runs attention more than once in a layer"
_SPARSE = "sparse attention, whose keys an indexer picks"
_SMALL: dict[str, object] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_BLOOM: dict[str, object] = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_GPTJ: dict[str, object] = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_MPT: dict[str, object] = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4}
_XGLM: dict[str, object] = {"vocab_size": VOCAB, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96}
_NEO: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
}


def _default(model_type: str) -> Family:
    """The configuration as it is, for what is refused before any weight is read."""
    return Family(model_type, shape={})


def _small(model_type: str, **settings: object) -> Family:
    return Family(model_type, {"intermediate_size": 96, **settings}, shape=_SMALL)


# What README.md calls each group -> (row, what the refusal says), refused by the configuration alone
BY_CONFIG: Mapping[str, tuple[tuple[Family, str], ...]] = {
    "recurrent layers (state-space or linear attention), alone or beside attention": (
        (_default("mamba"), _RECURRENT),
        (_default("mamba2"), _RECURRENT),
        (_default("falcon_mamba"), _RECURRENT),
        (_default("jamba"), _RECURRENT),
        (_default("bamba"), _RECURRENT),
        (_default("qwen3_next"), _RECURRENT),
        (_default("qwen3_5"), _RECURRENT),
        (_default("qwen3_5_moe"), _RECURRENT),
        (_default("qwen4_exp"), _RECURRENT),
        (_default("kimi_linear"), _RECURRENT),
        (_default("nemotron_h"), _RECURRENT),
        (_default("recurrent_gemma"), _RECURRENT),
        (_default("minimax"), _RECURRENT),
        (_default("bailing_hybrid"), _RECURRENT),
        (_default("granitemoehybrid"), _RECURRENT),
        (_default("olmo_hybrid"), _RECURRENT),
        (_default("zamba"), _RECURRENT),
        (_default("zamba2"), _RECURRENT),
        (_default("zaya"), "layers that join attention with a recurrent state"),
        (_default("falcon_h1"), "layers that join attention with a recurrent state"),
    ),
    "convolutions over tokens": (
        (_small("lfm2", layer_types=["conv", "full_attention"]), r"convolution layers.*\(conv\)"),
        (_small("lfm2_moe", layer_types=["full_attention", "conv"]), "convolution layers"),
        (_default("lfm3"), "convolution layers"),
    ),
    "keys picked by an indexer, compressed, or cut in chunks": (
        (_default("deepseek_v32"), _SPARSE),
        (_default("deepseek_v4"), "attention over compressed keys and values"),
        (_default("glm_moe_dsa"), _SPARSE),
        (_default("hy_v4"), _SPARSE),
        (_default("llama4"), "chunked attention, whose mask restarts at every chunk"),
        (
            Family("llama4_text", {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}, shape={}),
            "scales attention by a token's row in a pass",
        ),
    ),
    "keys and values shared between layers": (
        (_default("gemma3n"), "some layers read the keys and values of others"),
        (
            Family("gemma4_text", {"num_hidden_layers": 30, "num_kv_shared_layers": 10}, "shared", shape={}),
            "some layers read the keys and values of others",
        ),
    ),
    "encoder-decoders": tuple(
        (_default(name), "an encoder-decoder model") for name in ("bart", "mbart", "pegasus", "t5", "whisper")
    ),
    "images or sound without a text model of its own in `transformers`": (
        (_default("qwen2_vl"), _NOT_TEXT),
        (_default("qwen3_vl"), _NOT_TEXT),
        (_default("mistral3"), _NOT_TEXT + ".*the mistral model inside could"),
        (_default("llava"), _NOT_TEXT + ".*the llama model inside could"),
        (_default("vit"), _NOT_TEXT),
    ),
}

# The same, refused once the model stands: by a look at one forward pass.
BY_PASS: Mapping[str, tuple[tuple[Family, str], ...]] = {
    "recurrent layers (state-space or linear attention), alone or beside attention": (
        (_small("rwkv", attention_hidden_size=64), "keeps a recurrent state instead of keys and values"),
        (
            Family("xlstm", {"vocab_size": VOCAB, "hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2}, shape={}),
            "keeps a recurrent state instead of keys and values",
        ),
    ),
    "attention computed inside the layer (older files of `transformers`)": (
        (Family("bloom", shape=_BLOOM), _INLINE),
        (Family("codegen", shape=_GPTJ), _INLINE),
        (Family("falcon", shape=_SMALL), _INLINE),
        (Family("gpt_neo", shape=_NEO), _INLINE),
        (_small("gpt_neox_japanese"), _INLINE),
        (Family("gptj", shape=_GPTJ), _INLINE),
        (Family("mpt", shape=_MPT), _INLINE),
        (Family("xglm", shape=_XGLM), _INLINE),
    ),
    "attention twice in a layer, layers run more than once, or a mask of its own": (
        (_small("diffllama"), _TWICE),
        (Family("hrm_text", shape=_SMALL), _TWICE),
        (_small("doge"), "masks its keys in a way of its own"),
        (
            Family("phimoe", {"sliding_window": 100, "num_local_experts": 4}, "lost window"),
            r"attention window \(100 tokens\) gets lost",
        ),
    ),
    "encoders": (
        (_small("bert"), _LATER),
        (_small("electra"), _LATER),
        (_small("roberta"), _LATER),
        (
            Family("gemma3_text", {"use_bidirectional_attention": True, "num_key_value_heads": 2}, "both", _SMALL),
            _LATER,
        ),
    ),
}
GROUPS: Mapping[str, tuple[tuple[Family, str], ...]] = {
    group: (*BY_CONFIG.get(group, ()), *BY_PASS.get(group, ())) for group in {**BY_CONFIG, **BY_PASS}
}
