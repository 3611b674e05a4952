"""The decoder families that are served, as tiny random models that use what is particular to each.

Windows are 8 tokens and scaled rotary embeddings start from a context of 16, so that sequences of 30 to 40 tokens meet
them; heads are often wider than width / heads. The contract tests prove every row, and README.md lists exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 96
WINDOW = 8
LAYERS = 3
CONTEXT = 256
Settings = Mapping[str, object]

_TOKENS: Settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: Settings = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_UNGROUPED: Settings = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
_GPT: Settings = {**_TOKENS, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}
_DBRX: Settings = {**_TOKENS, "d_model": 64, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": CONTEXT}
_WIDE_HEADS: Settings = {"head_dim": 24}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_SLIDING: Settings = {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}
_LATENT: Settings = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_MOE: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Settings = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
_DENSE_FIRST: Settings = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SHARED_EXPERT: Settings = {"shared_expert_intermediate_size": 48}
_GRANITE: Settings = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}
_VISION: Settings = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
_AUDIO: Settings = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 32,
    "input_size": 16,
    "nemo_conv_channels": 32,
    "depthwise_separable_out_channel": 32,
}


def rope(kind: str = "default", **more: object) -> Settings:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


_HALF_ROTARY = rope(partial_rotary_factor=0.5)
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
_LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    long_factor=[8.0] * 8,
)
_TWO_ROPES: Settings = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row: a model type of `transformers`, told apart from other rows of the same type by `variant`."""

    model_type: str
    settings: Settings = field(default_factory=dict)
    variant: str = ""
    shape: Settings = field(default_factory=lambda: _SHAPE)

    def __str__(self) -> str:
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type

    def config(self, **overrides: object) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **{**self.shape, **self.settings, **overrides})


def _within(model_type: str, text: Family, **settings: object) -> Family:
    """A model of several kinds of input whose text part is another row."""
    nested = {"model_type": text.model_type, **text.shape, **text.settings}
    return Family(model_type, {"text_config": nested, **settings}, shape={})


_GEMMA3 = Family("gemma3_text", {**_SLIDING, **_TWO_ROPES, **_WIDE_HEADS, "query_pre_attn_scalar": 40})
_GEMMA4 = Family("gemma4_text", {**_SLIDING, **_WIDE_HEADS, "global_head_dim": 32, "hidden_size_per_layer_input": 0})
_PERSIMMON = Family("persimmon", {"qk_layernorm": True, **_HALF_ROTARY}, shape=_UNGROUPED)
_IMAGES: Settings = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}

# What README.md calls each group -> its rows.
TABLE: Mapping[str, tuple[Family, ...]] = {
    "rotary positions, full attention": (
        Family("apertus"),
        Family("arcee"),
        Family("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
        Family("ernie4_5", _WIDE_HEADS),
        Family("gemma", _WIDE_HEADS),
        Family("glm", {"head_dim": 16, **_HALF_ROTARY}),
        Family("glm4", {"head_dim": 16, **_HALF_ROTARY}),
        Family("gpt_neox", {"use_parallel_residual": True, **_HALF_ROTARY}, shape=_UNGROUPED),
        Family("granite", _GRANITE),
        Family(
            "granitemoehybrid",
            {**_GRANITE, "num_local_experts": 0, "layer_types": ["full_attention"] * LAYERS, **rope()},
            "attention",
        ),
        Family("helium", {"head_dim": 16}),
        Family("hunyuan_v1_dense", _WIDE_HEADS),
        Family("hyperclovax", {"attention_multiplier": 0.1, "residual_multiplier": 0.5}),
        Family("internlm3", {"head_dim": 16}),
        Family("iquestcoder", {"head_dim": 16}),
        Family("jais2"),
        Family("llama"),
        Family("llama", {**_WIDE_HEADS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "tied"),
        Family("llama", rope("linear", factor=4.0), "linear"),
        Family("llama", rope("dynamic", factor=4.0), "dynamic"),
        Family("llama", _YARN, "yarn"),
        Family(
            "llama",
            rope("llama3", factor=8.0, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=16),
            "llama3",
        ),
        Family(
            "ministral3",
            {
                **_WIDE_HEADS,
                **rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3),
            },
        ),
        Family("nanochat", {"final_logit_softcapping": 5.0}),
        Family("nemotron", {"head_dim": 16, **_HALF_ROTARY}),
        Family("olmo", {"clip_qkv": 1.0}),
        Family("olmo2"),
        _PERSIMMON,
        Family("phi", {"qk_layernorm": True, **_HALF_ROTARY}),
        Family("qwen3", {**_WIDE_HEADS, **_YARN}),
        Family("seed_oss", _WIDE_HEADS),
        Family("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, **_HALF_ROTARY}),
    ),
    "sliding windows in some layers or all": (
        Family("cohere2", {**_SLIDING, "logit_scale": 0.5}),
        Family(
            "cohere_compass_text",
            {
                **_SLIDING,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        Family("cwm", {**_SLIDING, **_WIDE_HEADS}),
        Family("exaone4", _SLIDING),
        Family(
            "gemma2",
            {
                **_SLIDING,
                **_WIDE_HEADS,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 5.0,
                "query_pre_attn_scalar": 40,
            },
        ),
        _GEMMA3,
        _GEMMA4,
        Family("granite_swa", {**_GRANITE, **_SLIDING}),
        Family("ministral", {**_SLIDING, **_WIDE_HEADS}),
        Family("mistral", {**_WIDE_HEADS, "sliding_window": WINDOW}),
        Family("modernbert-decoder", {"local_attention": 2 * WINDOW, "layer_types": _LAYER_TYPES}),
        Family("olmo3", _SLIDING),
        Family("phi3", {"sliding_window": WINDOW, **_HALF_ROTARY}),
        Family("phi3", {"sliding_window": None, "original_max_position_embeddings": 64, **_LONGROPE}, "longrope"),
        Family("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
        Family("smollm3", {**_SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]}),
        Family("starcoder2", {"sliding_window": WINDOW}),
        Family("vaultgemma", {**_SLIDING, **_WIDE_HEADS, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 40}),
    ),
    "mixtures of experts": (
        Family("afmoe", {**_SLIDING, **_MOE, **_WIDE_HEADS, "num_shared_experts": 1, "mup_enabled": True}),
        Family("aria_text", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
        Family("beam", {**_SLIDING, **_MOE, **_WIDE_HEADS, "n_group": 2, "topk_group": 1}),
        Family("cohere2_moe", {**_SLIDING, **_WIDE_HEADS, **_MOE, "num_shared_experts": 1, "logit_scale": 0.5}),
        Family(
            "dbrx",
            {
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
                "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            },
            shape=_DBRX,
        ),
        Family("dots1", {**_SLIDING, **_ROUTED, "first_k_dense_replace": 1}),
        Family("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
        Family("exaone_moe", {**_SLIDING, **_MOE, "first_k_dense_replace": 1}),
        Family("flex_olmo", _MOE),
        Family("flint", {**_SLIDING, **_MOE, **_WIDE_HEADS, **_SHARED_EXPERT}),
        Family("glm4_moe", {**_ROUTED, "head_dim": 16, "use_qk_norm": True, "first_k_dense_replace": 1}),
        Family("gpt_oss", {**_SLIDING, **_LOCAL_MOE, "head_dim": 16, **_YARN}),
        Family("granitemoe", {**_GRANITE, **_LOCAL_MOE}),
        Family("granitemoe_swa", {**_GRANITE, **_SLIDING, **_LOCAL_MOE}),
        Family("granitemoeshared", {**_GRANITE, **_LOCAL_MOE, "shared_intermediate_size": 48}),
        Family("hunyuan_v1_moe", {**_WIDE_HEADS, "num_experts": 4, "moe_topk": 2}),
        Family("hy_v3", {**_MOE, **_WIDE_HEADS, **_DENSE_FIRST, "num_shared_experts": 1}),
        Family("jetmoe", {**_LOCAL_MOE, "kv_channels": 16}),
        Family("kolibri1", {**_SLIDING, **_MOE, **_WIDE_HEADS, **_SHARED_EXPERT}),
        Family("laguna", {**_SLIDING, **_MOE, **_WIDE_HEADS, **_SHARED_EXPERT}),
        Family("mellum", {**_SLIDING, **_MOE, **_WIDE_HEADS}),
        Family("mimo_v2_flash", {**_SLIDING, **_ROUTED, "head_dim": 16, "v_head_dim": 12}),
        Family("minimax_m2", {**_LOCAL_MOE, **_WIDE_HEADS}),
        Family("mixtral", {**_LOCAL_MOE, "sliding_window": WINDOW}),
        Family("olmoe", {**_MOE, "clip_qkv": 1.0}),
        Family("phimoe", _LOCAL_MOE),
        Family("qwen2_moe", {**_MOE, **_SHARED_EXPERT, "mlp_only_layers": [0]}),
        Family("qwen3_moe", {**_MOE, **_WIDE_HEADS, "mlp_only_layers": [0]}),
        Family("solar_open", {**_ROUTED, **_WIDE_HEADS}),
    ),
    "latent attention (keys wider than values)": (
        Family("axk1", {**_LATENT, **_ROUTED, **_DENSE_FIRST}),
        Family(
            "deepseek_v2",
            {**_LATENT, **_ROUTED, **_YARN, "topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
        ),
        Family("deepseek_v3", {**_LATENT, **_ROUTED, "first_k_dense_replace": 1}),
        Family("glm4_moe_lite", {**_LATENT, **_ROUTED, **_DENSE_FIRST}),
        Family(
            "longcat_flash",
            {
                **_LATENT,
                "head_dim": 8,
                "num_layers": LAYERS,
                "ffn_hidden_size": 96,
                "expert_ffn_hidden_size": 32,
                "moe_topk": 2,
                "n_routed_experts": 4,
                "zero_expert_num": 2,
            },
        ),
        Family("minicpm3", _LATENT),
        Family("youtu", _LATENT),
    ),
    "learned or fixed absolute positions": (
        Family("biogpt", shape=_UNGROUPED),
        Family("ctrl", {"dff": 96}, shape=_GPT),
        Family("gpt2", {"n_inner": 96}, shape=_GPT),
        Family("gpt_bigcode", {"n_inner": 96, "multi_query": True}, shape=_GPT),
        Family("gpt_bigcode", {"n_inner": 96, "multi_query": False}, "heads", shape=_GPT),
        Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, shape=_UNGROUPED),
        Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "norm first", shape=_UNGROUPED),
    ),
    "models of images or sound, as text models": (
        _within("fuyu", _PERSIMMON, image_token_id=90),
        _within("gemma3", _GEMMA3, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=90),
        _within("gemma4", _GEMMA4, vision_config={**_VISION, "position_embedding_size": 64}, **_IMAGES),
        Family("phi4_multimodal", {"vision_config": {**_VISION, "crop_size": 28}, "audio_config": _AUDIO}),
    ),
}
FAMILIES: tuple[Family, ...] = tuple(family for group in TABLE.values() for family in group)


def family(name: str) -> Family:
    """The row of this name (`str(row)`)."""
    return next(row for row in FAMILIES if str(row) == name)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of which everything that a checkpoint holds is random: a zero would hide what it multiplies."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.12)
    model.eval()
    return model


def save_random(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Write a checkpoint folder without a tokenizer; the model that it holds."""
    model = random_model(config)
    model.save_pretrained(folder)
    return model
