"""Tiny random block-diffusion drafts for the models of `tests/tiny.py`: spec and canonical tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from engine.models.dflash.spec import DFlashSpec, DraftLayer


def tiny_spec(target: PretrainedConfig, **changes: Any) -> DFlashSpec:
    """Two layers of full attention, three taps, blocks of 6, unless `changes` says otherwise."""
    spec = DFlashSpec(
        hidden_size=target.hidden_size,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=(DraftLayer(), DraftLayer()),
        taps=(0, 1, 2),
        block_size=6,
        mask_token_id=target.vocab_size - 1,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
    )
    return replace(spec, **changes)


def tiny_tensors(spec: DFlashSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the canonical names (see `engine.models.dflash.formats.load`), float32.

    Wide enough that logits differ by far more than rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    width, inner, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    tensors = {"fc.weight": noise(width, len(spec.taps) * width)}
    norms = {"hidden_norm": width, "norm": width}
    for index in range(len(spec.layers)):
        prefix = f"layers.{index}."
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        for part, rows in {"q": heads, "k": kv, "v": kv}.items():
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = noise(rows, width)
        tensors[f"{prefix}self_attn.o_proj.weight"] = noise(width, heads)
        if spec.attention_bias:
            for part, rows in {"q": heads, "k": kv, "v": kv, "o": width}.items():
                tensors[f"{prefix}self_attn.{part}_proj.bias"] = noise(rows)
        tensors[f"{prefix}mlp.gate_proj.weight"] = noise(inner, width)
        tensors[f"{prefix}mlp.up_proj.weight"] = noise(inner, width)
        tensors[f"{prefix}mlp.down_proj.weight"] = noise(width, inner)
        norms |= {f"{prefix}input_layernorm": width, f"{prefix}post_attention_layernorm": width}
        norms |= {f"{prefix}self_attn.q_norm": spec.head_dim, f"{prefix}self_attn.k_norm": spec.head_dim}
        if spec.conv_kernel:
            for name in ("attention_conv", "mlp_conv"):
                tensors[f"{prefix}{name}.base_kernel"] = noise(2, spec.conv_kernel, width, scale=0.5)
                rows = 2 * spec.conv_kernel * width // spec.conv_group
                tensors[f"{prefix}{name}.kernel_projection.weight"] = noise(rows, width, scale=0.05)
    tensors |= {f"{name}.weight": 1 + noise(size) for name, size in norms.items()}
    if spec.own_embedding:
        tensors["embed_tokens.weight"] = noise(vocab, width, scale=0.3)
    if spec.own_head:
        tensors["lm_head.weight"] = noise(spec.draft_vocab_size, width, scale=0.3)
    if spec.draft_vocab_size < vocab:
        tensors["d2t"] = torch.randperm(vocab, generator=generator)[: spec.draft_vocab_size].sort().values
    if spec.markov_rank:
        tensors["markov_head.markov_w1.weight"] = noise(vocab, spec.markov_rank, scale=1.0)
        tensors["markov_head.markov_w2.weight"] = noise(spec.draft_vocab_size, spec.markov_rank, scale=0.7)
    if spec.confidence_head:
        columns = width + (spec.markov_rank if spec.confidence_with_markov else 0)
        tensors["confidence_head.proj.weight"] = noise(1, columns)
        tensors["confidence_head.proj.bias"] = noise(1)
    if spec.selector_rank:
        tensors["candidate_selector.predecessor_codebook"] = noise(vocab, spec.selector_rank, scale=0.7)
        tensors["candidate_selector.successor_codebook"] = noise(vocab, spec.selector_rank, scale=0.7)
        tensors["candidate_selector.hidden_projection.weight"] = noise(spec.selector_rank, width)
    return tensors
