"""The one decoder layer of an EAGLE-3 draft, with merged products and the kernels of the target's fused layers."""

from __future__ import annotations

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.kernels import ops
from engine.kernels.layout import HeadLayout
from engine.models.eagle3.spec import ACTIVATIONS, Eagle3Spec
from engine.models.fused.attention import RopeForm
from engine.models.fused.backbone import RopeSource
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import FusedNorm, Rope, add_norm, merge_linears
from engine.models.rotary import rotary_of
from engine.protocols import StepAttention
from engine.runtime.kv_cache import LayerCache, LayerShape

SPARE = 128  # positions past the target's context that the rotary table holds


class Eagle3Network(nn.Module):
    """g = fc(states); layer(embedding of the next token, g); a norm. See `spec.Eagle3Spec` for the variants.

    Embeddings are handed in: `embedding` is None where the table is the target's, and so is `head`.
    """

    def __init__(
        self,
        spec: Eagle3Spec,
        tensors: dict[str, torch.Tensor],
        context_length: int = 0,
    ) -> None:
        """Tensors as `formats.load` gives them, in one dtype. `context_length`: positions of the rotary table."""
        super().__init__()

        def linear(*names: str) -> nn.Linear:
            return merge_linears([_linear(tensors, f"{name}_proj") for name in names])

        def norm(name: str) -> FusedNorm:
            return FusedNorm(nn.Parameter(tensors[f"{name}.weight"], requires_grad=False), spec.rms_norm_eps, 0.0)

        self.spec = spec
        self.shape = LayerShape(spec.num_kv_heads, spec.head_dim, spec.head_dim)
        self.fc = _linear(tensors, "fc")
        self.input_norm = norm("input_norm") if spec.norm_before_fc else None
        self.fc_norm = nn.ModuleList(norm(f"fc_norm.{i}") for i in range(len(spec.taps) if spec.fc_norm else 0))
        layer = "layers.0."
        self.input_layernorm = norm(f"{layer}input_layernorm")
        self.hidden_norm = norm(f"{layer}hidden_norm")
        self.post_attention_layernorm = norm(f"{layer}post_attention_layernorm")
        self.norm = norm("norm")
        # Context needs no query, so that this product is one of its own.
        self.query = linear(f"{layer}self_attn.q")
        self.key_value = linear(f"{layer}self_attn.k", f"{layer}self_attn.v")
        self.o_proj = linear(f"{layer}self_attn.o")
        gate_up = linear(f"{layer}mlp.gate", f"{layer}mlp.up")
        self.mlp = FusedMLP(gate_up, linear(f"{layer}mlp.down"), ACTIVATIONS[spec.hidden_act])
        self.head = _linear(tensors, "lm_head") if spec.own_head else None
        # No parameter: packing linear layers copies those, and this may be large.
        self.embedding = tensors["embed_tokens.weight"] if spec.own_embedding else None
        self.rope = _rope_source(spec)
        if context_length:
            self.rope.tabulate(context_length + SPARE, self.norm.weight.device)

    def fuse(self, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The feature g [T, width] of each token, from the target's hidden states [T, target's width] at the taps."""
        if len(self.fc_norm):
            states = tuple(norm(state) for norm, state in zip(self.fc_norm, states, strict=True))
        joined = torch.cat(states, dim=1).to(self.post_attention_layernorm.weight.dtype)
        if self.input_norm is not None:
            joined = self.input_norm(joined)
        fused: torch.Tensor = self.fc(joined)
        return fused

    def inputs(self, embedded: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the products read [T, 2 * width], and the residual stream [T, width], for tokens with their features."""
        width = self.spec.hidden_size
        both = embedded.new_empty(len(embedded), 2 * width)
        for norm, x, out in (
            (self.input_layernorm, embedded, both[:, :width]),
            (self.hidden_norm, feature, both[:, width:]),
        ):
            ops.add_rms_norm(x, None, norm.weight, norm.eps, out=out)
        return both, both[:, width:].contiguous() if self.spec.norm_before_residual else feature

    def write(self, both: torch.Tensor, rope: Rope, slots: torch.Tensor, cache: LayerCache) -> None:
        """Put keys and values of [T, 2 * width] into the pool's rows `slots` [T]."""
        ops.head_norm_rope_write(self.key_value(both), *rope, slots, cache, HeadLayout(0))

    def forward(
        self,
        both: torch.Tensor,
        residual: torch.Tensor,
        rope: Rope,
        slots: torch.Tensor,
        cache: LayerCache,
        attention: StepAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer on `inputs`, keys and values to `slots` [T]: (what the next token is fed, normed) [T, width]."""
        qkv = torch.cat((self.query(both), self.key_value(both)), dim=1)
        query = ops.head_norm_rope_write(qkv, *rope, slots, cache, HeadLayout(self.spec.num_heads))
        scale = self.spec.head_dim**-0.5
        attended = attention.attend(query, cache, scale=scale, window=self.spec.window).flatten(1)
        normed, stream = add_norm(self.post_attention_layernorm, residual, self.o_proj(attended))
        normed, stream = add_norm(self.norm, stream, self.mlp.run(normed))
        return (normed if self.spec.norm_output else stream), normed


def _linear(part: dict[str, torch.Tensor], name: str) -> nn.Linear:
    weight, bias = part[f"{name}.weight"], part.get(f"{name}.bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _rope_source(spec: Eagle3Spec) -> RopeSource:
    try:
        compute = rotary_of(dict(spec.rope), spec.head_dim, spec.max_position_embeddings or 2048)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"config.json: rope parameters {dict(spec.rope)}: {error}") from error
    return RopeSource(compute, RopeForm.FULL)
