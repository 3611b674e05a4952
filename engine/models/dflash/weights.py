"""The tensors of a DFlash draft: which there are, of what shape, and how files name them."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.errors import ModelLoadError
from engine.models.dflash.spec import DFlashSpec
from engine.models.draft_files import absolute_ids

# Stored by some trainers though they can be computed, or are the target's own.
_SURPLUS = ("rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")
_RENAMED = {
    f"candidate_selector.{side}_codebook.weight": f"candidate_selector.{side}_codebook"
    for side in ("predecessor", "successor")
}


def tensor_shapes(spec: DFlashSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the finished draft, in z-lab's names; without extras, 11 per layer and 3."""
    width, taps = spec.hidden_size, len(spec.taps)
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(spec.layers)):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _layer_shapes(spec).items()}
    shapes |= {"fc.weight": (width, taps * width), "hidden_norm.weight": (width,), "norm.weight": (width,)}
    if spec.own_embedding:
        shapes["embed_tokens.weight"] = (spec.vocab_size, width)
    if spec.own_head:
        shapes["lm_head.weight"] = (spec.draft_vocab_size, width)
    if spec.draft_vocab_size < spec.vocab_size:
        shapes["d2t"] = (spec.draft_vocab_size,)
    if spec.markov_rank:
        shapes["markov_head.markov_w1.weight"] = (spec.vocab_size, spec.markov_rank)
        shapes["markov_head.markov_w2.weight"] = (spec.draft_vocab_size, spec.markov_rank)
    if spec.confidence_head:
        inputs = width + (spec.markov_rank if spec.confidence_with_markov else 0)
        shapes |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
    if spec.selector_rank:
        shapes |= dict.fromkeys(_RENAMED.values(), (spec.vocab_size, spec.selector_rank))
        shapes["candidate_selector.hidden_projection.weight"] = (spec.selector_rank, width)
    return shapes


def _layer_shapes(spec: DFlashSpec) -> dict[str, tuple[int, ...]]:
    width, inner = spec.hidden_size, spec.intermediate_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {"q_proj": (query, width), "k_proj": (key, width), "v_proj": (key, width), "o_proj": (width, query)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in linears.items()}
    if spec.attention_bias:
        shapes |= {f"self_attn.{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"self_attn.{name}.weight": (spec.head_dim,) for name in ("q_norm", "k_norm")}
    shapes |= {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
    shapes["mlp.down_proj.weight"] = (width, inner)
    if spec.conv_kernel:
        groups = width // spec.conv_group
        for name in ("attention_conv", "mlp_conv"):
            shapes[f"{name}.base_kernel"] = (2, spec.conv_kernel, width)
            shapes[f"{name}.kernel_projection.weight"] = (2 * spec.conv_kernel * groups, width)
    return shapes


def canonical(
    stored: dict[str, torch.Tensor], spec: DFlashSpec, tied: bool, where: str
) -> tuple[DFlashSpec, dict[str, torch.Tensor]]:
    """z-lab's names, `d2t` as absolute ids, and the spec with what only the tensors tell (own embedding, own head).

    `tied`: an own embedding without a head is the head as well. Raises ModelLoadError for a broken d2t.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("model.")
        plain = _RENAMED.get(plain, plain)
        if plain in tensors:
            raise ModelLoadError(f"{where}: the tensor {plain} stands there twice, with and without a prefix")
        if not plain.endswith(_SURPLUS):
            tensors[plain] = tensor
    if tied and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    t2d = tensors.pop("t2d", None)
    if "d2t" in tensors:
        tensors["d2t"] = absolute_ids(tensors["d2t"], t2d, spec.vocab_size, where)
        if len(tensors["d2t"]) == spec.vocab_size == spec.draft_vocab_size:
            del tensors["d2t"]  # it ascends, so it is the identity
    spec = replace(spec, own_embedding="embed_tokens.weight" in tensors, own_head="lm_head.weight" in tensors)
    return spec, tensors


def drop_copies(
    spec: DFlashSpec, tensors: dict[str, torch.Tensor], embedding: torch.Tensor, head: torch.Tensor
) -> tuple[DFlashSpec, dict[str, torch.Tensor]]:
    """Without an own embedding or head that equals the target's (`embedding`, `head` [V, D], in any dtype, anywhere).

    DSpark and `speculators` checkpoints hold frozen copies; keeping them would only cost memory.
    """
    left = dict(tensors)
    for name, own in (("embed_tokens.weight", embedding), ("lm_head.weight", head)):
        stored = left.get(name)
        if stored is not None and stored.shape == own.shape and torch.equal(stored.to(own), own):
            del left[name]
    return replace(spec, own_embedding="embed_tokens.weight" in left, own_head="lm_head.weight" in left), left
