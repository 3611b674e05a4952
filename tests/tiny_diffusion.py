"""Tiny random masked-diffusion checkpoints in the form in which each family is published: names, config, tokenizer.

Two layers, width 32, the byte tokenizer of `tests/tiny.py` with a mask token and an end-of-turn token. The head is
wide enough that confidences spread from nearly 0 to nearly 1.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import CHAT_TEMPLATE

WIDTH, INNER, LAYERS, HEADS = 32, 48, 2, 4
EXPERT_INNER = 20
CONTEXT = 512
BOS, EOS, PAD, EOT, MASK = range(256, 261)  # behind the 256 bytes, in all kinds but Stable-DiffCoder
VOCAB = 261


@dataclass(frozen=True)
class Kind:
    """One published form. `attention` is full or block_causal; block 0 means that the checkpoint does not say."""

    model_type: str
    architecture: str
    mask_text: str
    attention: str
    base: dict[str, Any]  # of config.json, beside the shapes
    block: int = 0
    shift: bool = False
    kv_heads: int = 2
    head_dim: int = 8
    bias: bool = False  # of q, k and v
    norms: bool = False  # of each query and key head
    tied: bool = False
    experts: int = 0  # in place of each MLP, two of them for each token; the first layer of LLaDA-MoE has none
    eot_text: str = "<|im_end|>"
    specials: dict[str, int] = field(default_factory=dict)  # empty: BOS ... MASK behind the bytes
    subfolder: str = ""  # where only the checkpoint's name says what it is

    @property
    def mask_id(self) -> int:
        return self.specials.get(self.mask_text, MASK)

    @property
    def vocab_size(self) -> int:
        return 256 + len(self.specials) if self.specials else VOCAB


_LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "multi_query_attention": None,
    "attention_dropout": 0.0,
    "mask_token_id": MASK,
}
_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
_DREAM = {**_QWEN, "mask_token_id": MASK, "use_mrope": False, "sliding_window": None, "max_window_layers": 28}
_V2 = {**_QWEN, "bd_size": 16, "conplemenrary_mask": True, "max_window_layers": 28, "sliding_window": 131072}
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "attention_bias": False}
_A2D_LLAMA = {**_LLAMA, "mask_token_id": MASK, "mlp_bias": False}
_SEED = {
    "<[begin▁of▁sentence]>": 0,
    "<[PAD▁TOKEN]>": 1,
    "<[end▁of▁sentence]>": 2,
    "<[SEP▁TOKEN]>": 3,
    "<[CLS▁TOKEN]>": 4,
    "<[MASK▁TOKEN]>": 5,
}

TINY: dict[str, Kind] = {
    "llada": Kind("llada", "LLaDAModelLM", "<|mdm_mask|>", "full", _LLADA, kv_heads=4, eot_text="<|eot_id|>"),
    "dream": Kind("Dream", "DreamModel", "<|mask|>", "full", _DREAM, shift=True, bias=True),
    "fast_dllm_v2": Kind(
        "Fast_dLLM_Qwen",
        "Fast_dLLM_QwenForCausalLM",
        "|<MASK>|",
        "block_causal",
        _V2,
        block=16,
        shift=True,
        bias=True,
        tied=True,
    ),
    "sdar": Kind(
        "sdar",
        "SDARForCausalLM",
        "<|MASK|>",
        "block_causal",
        {**_QWEN, "attention_bias": False, "block_size": 4},
        block=4,
        head_dim=16,
        norms=True,
    ),
    "stable_diffcoder": Kind(
        "llama",
        "StableDiffcoderForCausalLM",
        "<[MASK▁TOKEN]>",
        "block_causal",
        _LLAMA,
        block=4,
        eot_text="<[end▁of▁sentence]>",
        specials=_SEED,
    ),
    "a2d_llama_full": Kind(
        "a2d-llama",
        "A2DLlamaLMHeadModel",
        "<|mask|>",
        "full",
        {**_A2D_LLAMA, "diffusion_attention": "full", "block_size": 8},
        block=8,
        tied=True,
    ),
    "a2d_llama_block": Kind(
        "a2d-llama",
        "A2DLlamaLMHeadModel",
        "<|mask|>",
        "block_causal",
        {**_A2D_LLAMA, "diffusion_attention": "block_causal", "block_size": 8},
        block=8,
        tied=True,
    ),
    "a2d_qwen2_block": Kind(
        "a2d-qwen2",
        "A2DQwen2LMHeadModel",
        "<|mask|>",
        "block_causal",
        _QWEN,
        bias=True,
        tied=True,
        subfolder="tiny-diffusion-bd3lm-v0.1",
    ),
    "a2d_qwen3_full": Kind(
        "a2d-qwen3",
        "A2DQwen3LMHeadModel",
        "<|mask|>",
        "full",
        {**_QWEN, "attention_bias": False},
        head_dim=16,
        norms=True,
        tied=True,
        subfolder="tiny-diffusion-mdlm-v0.1",
    ),
    "sdar_moe": Kind(
        "sdar_moe",
        "SDARMoeForCausalLM",
        "<|MASK|>",
        "block_causal",
        {
            **_QWEN,
            "attention_bias": False,
            "block_size": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": EXPERT_INNER,
            "norm_topk_prob": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        block=4,
        head_dim=16,
        norms=True,
        experts=4,
    ),
    "llada_moe": Kind(
        "llada",
        "LLaDAMoEModelLM",
        "<|mask|>",
        "full",
        {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "clip_qkv": None,
            "dense_intermediate_size": INNER,
            "expert_intermediate_size": EXPERT_INNER,
            "moe_layer_freq": [0, 1],
            "norm_topk_prob": None,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "partial_rotary_factor": 1,
            "qk_layernorm": True,
        },
        kv_heads=4,
        norms=True,
        eot_text="<|role_end|>",
        experts=4,
    ),
}
KINDS = tuple(kind for kind in TINY if not TINY[kind].experts)
EXPERT_KINDS = tuple(kind for kind in TINY if TINY[kind].experts)


def save_tiny_diffusion(kind: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a checkpoint folder of this kind and return it (it may lie inside `folder`).

    `config` changes keys of config.json; None takes one out. The weights stay the same function of `seed`.
    """
    shape = TINY[kind]
    folder = folder / shape.subfolder
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**_raw_config(shape), **config}
    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in raw if raw[key] is not None}, indent=2))
    save_file(dict(raw_tensors(shape, seed)), folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(shape, folder)
    return folder


def raw_tensors(shape: Kind, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Random float32 weights under the published names; a tensor depends on its name and the seed alone."""
    for name, size, spread in _shapes(shape):
        public = _llada_name(name) if shape.architecture == "LLaDAModelLM" else name
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        noise = torch.randn(size, generator=generator) * spread
        yield public, 1 + noise if "norm" in name else noise


def save_tokenizer(shape: Kind, folder: Path) -> None:
    """tokenizer.json with one token per byte and the special tokens of the kind, the mask among them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = shape.specials or {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, shape.eot_text: EOT, shape.mask_text: MASK}
    first = len(shape.specials)
    vocab = dict(shape.specials) | {char: first + i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    assert all(tokenizer.token_to_id(text) == token_id for text, token_id in specials.items())
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, pad, eos = list(specials)[:3] if shape.specials else ("<bos>", "<pad>", "<eos>")
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "chat_template": CHAT_TEMPLATE}
    if shape.mask_text == "<|mask|>":
        names["mask_token"] = shape.mask_text  # as Dream's and the a2d conversions' say
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def _raw_config(shape: Kind) -> dict[str, Any]:
    first = {"architectures": [shape.architecture], "model_type": shape.model_type, "torch_dtype": "float32"}
    bos, pad, eos = (0, 1, 2) if shape.specials else (BOS, PAD, EOS)
    ids = {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": eos}
    if shape.architecture == "LLaDAModelLM":
        sizes = {
            "d_model": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "n_kv_heads": shape.kv_heads,
            "mlp_hidden_size": INNER,
            "max_sequence_length": CONTEXT,
            "vocab_size": shape.vocab_size,
            "embedding_size": shape.vocab_size,
            "weight_tying": shape.tied,
        }
        return {**first, **ids, **sizes, **shape.base, "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}}
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": CONTEXT,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
    }
    if shape.norms and shape.head_dim != WIDTH // HEADS:
        sizes["head_dim"] = shape.head_dim
    return {**first, **ids, **sizes, **shape.base}


def _shapes(shape: Kind) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """(Llama's name, shape, standard deviation) of every tensor."""
    heads, kv, dim = HEADS, shape.kv_heads, shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, WIDTH), 0.8 if shape.tied else 0.3
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", (WIDTH,), 0.1
        yield layer + "post_attention_layernorm.weight", (WIDTH,), 0.1
        for part, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            yield layer + f"self_attn.{part}_proj.weight", (rows, WIDTH), 0.3
            if shape.bias:
                yield layer + f"self_attn.{part}_proj.bias", (rows,), 0.2
        yield layer + "self_attn.o_proj.weight", (WIDTH, heads * dim), 0.3
        if shape.norms:
            yield layer + "self_attn.q_norm.weight", (dim,), 0.1
            yield layer + "self_attn.k_norm.weight", (dim,), 0.1
        routed = shape.base.get("moe_layer_freq", [shape.experts] * LAYERS)[index]
        if routed:
            yield layer + "mlp.gate.weight", (shape.experts, WIDTH), 0.3
        for part in [f"experts.{expert}." for expert in range(shape.experts)] if routed else [""]:
            inner = EXPERT_INNER if routed else INNER
            yield f"{layer}mlp.{part}gate_proj.weight", (inner, WIDTH), 0.3
            yield f"{layer}mlp.{part}up_proj.weight", (inner, WIDTH), 0.3
            yield f"{layer}mlp.{part}down_proj.weight", (WIDTH, inner), 0.3
    yield "model.norm.weight", (WIDTH,), 0.1
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, WIDTH), 0.8


_LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def _llada_name(name: str) -> str:
    for ours, theirs in _LLADA_NAMES.items():
        name = name.replace(ours, theirs)
    return name
