"""The tensors of an EAGLE-3 checkpoint under one set of names, each checked against the spec."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.errors import ModelLoadError
from engine.models.draft_files import absolute_ids, check_finite
from engine.models.eagle3.spec import ACTIVATIONS, Eagle3Spec

# Saved by some trainers, and not part of the draft: the target's own, or made from the configuration.
_IGNORED = ("verifier_norm.weight", "verifier_lm_head.weight", "t2d")


def check_numbers(where: str, spec: Eagle3Spec) -> None:
    """The draft's numbers against each other. Raises ModelLoadError that names the keys."""
    rules = (
        (spec.hidden_size > 0, f"hidden_size is {spec.hidden_size}; it must be above 0"),
        (
            spec.num_kv_heads > 0 and spec.num_heads % max(spec.num_kv_heads, 1) == 0,
            f"num_attention_heads {spec.num_heads} is no multiple of num_key_value_heads {spec.num_kv_heads}",
        ),
        (spec.head_dim > 0 and spec.head_dim % 2 == 0, f"head_dim is {spec.head_dim}; it must be even"),
        (spec.intermediate_size > 0, f"intermediate_size is {spec.intermediate_size}; it must be above 0"),
        (spec.rms_norm_eps > 0, f"rms_norm_eps is {spec.rms_norm_eps}; it must be above 0"),
        (spec.hidden_act in ACTIVATIONS, f"hidden_act is {spec.hidden_act!r}, not one of {', '.join(ACTIVATIONS)}"),
        (
            1 < spec.draft_vocab_size <= spec.vocab_size,
            f"draft_vocab_size is {spec.draft_vocab_size}; the target's vocabulary has {spec.vocab_size}",
        ),
        (1 <= spec.most <= 64, f"speculative_tokens is {spec.most}; it must be 1 to 64"),
        (spec.window is None or spec.window > 0, f"sliding_window is {spec.window}; it must be above 0"),
    )
    for holds, problem in rules:
        if not holds:
            raise ModelLoadError(f"{where}: {problem}")


def checked(
    where: str, stored: dict[str, torch.Tensor], spec: Eagle3Spec
) -> tuple[Eagle3Spec, dict[str, torch.Tensor]]:
    """The spec, now with what the tensors tell, and the tensors it needs. Raises ModelLoadError that names one."""
    tensors = {_canonical(name): tensor for name, tensor in stored.items()}
    reduced = spec.draft_vocab_size != spec.vocab_size
    own_embedding, own_head = "embed_tokens.weight" in tensors, "lm_head.weight" in tensors
    if reduced and not own_head:
        raise ModelLoadError(f"{where}: lm_head.weight is missing, and draft_vocab_size is not the target's vocabulary")
    if reduced and "d2t" not in tensors:
        raise ModelLoadError(f"{where}: d2t is missing, and draft_vocab_size is not the target's vocabulary")
    if spec.hidden_size != spec.target_hidden_size and not own_embedding:
        raise ModelLoadError(
            f"{where}: embed_tokens.weight is missing, and the target's embedding has another width "
            f"({spec.target_hidden_size}, not {spec.hidden_size})"
        )
    if own_embedding and not own_head and not spec.own_head:  # tied to its own embedding
        tensors["lm_head.weight"], own_head = tensors["embed_tokens.weight"], True
    if not own_head and spec.hidden_size != spec.target_hidden_size:
        raise ModelLoadError(f"{where}: lm_head.weight is missing, and the target's head has another width")
    spec = replace(spec, own_embedding=own_embedding, own_head=own_head)
    wanted = shapes(spec)
    for name, shape in wanted.items():
        if name not in tensors:
            raise ModelLoadError(f"{where}: the tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ModelLoadError(
                f"{where}: the tensor {name} is {list(tensors[name].shape)}, config.json makes it {list(shape)}"
            )
        if not tensors[name].is_floating_point():
            raise ModelLoadError(
                f"{where}: the tensor {name} is {tensors[name].dtype}; quantised drafts can't be served"
            )
    unknown = sorted(
        name for name in tensors if name not in wanted and name not in (*_IGNORED, "d2t") and "rotary_emb" not in name
    )
    if unknown:
        raise ModelLoadError(
            f"{where}: the tensor {unknown[0]} is unknown to this loader: it may change what is drafted"
        )
    chosen = {name: tensors[name] for name in wanted}
    check_finite(chosen, where)
    if "d2t" in tensors:
        ids = absolute_ids(tensors["d2t"], tensors.get("t2d"), spec.vocab_size, where)
        if len(ids) != spec.draft_vocab_size:
            raise ModelLoadError(f"{where}: d2t names {len(ids)} tokens, draft_vocab_size {spec.draft_vocab_size}")
        if reduced:  # else it ascends over the whole vocabulary, so it is the identity
            chosen["d2t"] = ids
    return spec, chosen


def shapes(spec: Eagle3Spec) -> dict[str, torch.Size]:
    """The shape of every floating-point tensor that a draft of this spec has."""
    width, dim, fused = spec.hidden_size, spec.head_dim, len(spec.taps) * spec.target_hidden_size
    query, kv, middle = spec.num_heads * dim, spec.num_kv_heads * dim, spec.intermediate_size
    found: dict[str, tuple[int, ...]] = {"fc.weight": (width, fused), "norm.weight": (width,)}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        found[f"layers.0.{name}.weight"] = (width,)
    products = {"q": (query, 2 * width), "k": (kv, 2 * width), "v": (kv, 2 * width), "o": (width, query)}
    for name, shape in products.items():
        found[f"layers.0.self_attn.{name}_proj.weight"] = shape
        if spec.attention_bias:
            found[f"layers.0.self_attn.{name}_proj.bias"] = shape[:1]
    for name, shape in {"gate": (middle, width), "up": (middle, width), "down": (width, middle)}.items():
        found[f"layers.0.mlp.{name}_proj.weight"] = shape
        if spec.mlp_bias:
            found[f"layers.0.mlp.{name}_proj.bias"] = shape[:1]
    if spec.norm_before_fc:
        found["input_norm.weight"] = (fused,)
    if spec.fc_norm:
        found |= {f"fc_norm.{i}.weight": (spec.target_hidden_size,) for i in range(len(spec.taps))}
    if spec.own_embedding:
        found["embed_tokens.weight"] = (spec.vocab_size, width)
    if spec.own_head:
        found["lm_head.weight"] = (spec.draft_vocab_size, width)
    return {name: torch.Size(shape) for name, shape in found.items()}


def _canonical(name: str) -> str:
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name
