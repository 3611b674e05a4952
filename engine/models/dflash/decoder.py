"""The decoder layers of a block-diffusion draft, with merged products, over packed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.kernels import ops
from engine.kernels.layout import HeadLayout
from engine.models.dflash.spec import DFlashSpec
from engine.models.fused.parts import Rope
from engine.protocols import StepAttention
from engine.runtime.kv_cache import LayerCache

Tensors = Mapping[str, torch.Tensor]
# Names of activations as configurations have them -> as `ops.gated_activation` has them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def merged(tensors: Tensors, names: Sequence[str]) -> nn.Linear:
    """One linear layer whose output is that of the layers `names`, one after another; biases where they have any."""
    weight = torch.cat([tensors[f"{name}.weight"] for name in names])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = parameter(weight)
    if f"{names[0]}.bias" in tensors:
        linear.bias = parameter(torch.cat([tensors[f"{name}.bias"] for name in names]))
    return linear


class BlockConvolution(nn.Module):
    """DFlash2's convolution over the slots of a block: its kernel is a learned one plus one made from each slot.

    y_t = sum over taps k of (base[k] + made_t[k]) * x_{t - k}, where x is 0 before the block; channels of a group share
    what is made. Two kernels are made from the normed input of attention or MLP: one for it, one for the output.
    """

    def __init__(self, spec: DFlashSpec, tensors: Tensors, name: str) -> None:
        super().__init__()
        self.block_size, self.taps, self.group = spec.block_size, spec.conv_kernel, spec.conv_group
        self.base = parameter(tensors[f"{name}.base_kernel"])  # [2, taps, D]
        self.projection = merged(tensors, [f"{name}.kernel_projection"])

    def kernels(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """normed [T, D] -> two kernels [T, taps, D], for input and output."""
        made = self.projection(normed).view(normed.shape[0], 2, self.taps, -1)
        both = made.repeat_interleave(self.group, dim=-1) + self.base
        return both[:, 0], both[:, 1]

    def forward(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        """x [T, D] of whole blocks, kernel [T, taps, D] -> [T, D]."""
        out = kernel[:, 0] * x
        blocks, summed = x.view(-1, self.block_size, x.shape[1]), out.view(-1, self.block_size, x.shape[1])
        for tap in range(1, min(self.taps, self.block_size)):
            summed[:, tap:] += kernel[:, tap].view(blocks.shape)[:, tap:] * blocks[:, :-tap]
        return out


class DecoderLayer(nn.Module):
    """A pre-norm layer of the Qwen3 shape: norms of query and key heads, grouped queries, a gated MLP."""

    def __init__(self, spec: DFlashSpec, tensors: Tensors, index: int) -> None:
        super().__init__()
        if spec.hidden_act not in ACTIVATIONS:
            raise ModelLoadError(f"hidden_act {spec.hidden_act!r} of the draft is not one of {', '.join(ACTIVATIONS)}")
        prefix = f"layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.window, self.causal = spec.layers[index].window, spec.layers[index].causal
        self.activation, self.eps, self.scale = ACTIVATIONS[spec.hidden_act], spec.rms_norm_eps, spec.head_dim**-0.5
        self.input_norm = parameter(tensors[f"{prefix}.input_layernorm.weight"])
        self.mlp_norm = parameter(tensors[f"{prefix}.post_attention_layernorm.weight"])
        self.query_norm = parameter(tensors[f"{attention}.q_norm.weight"])
        self.key_norm = parameter(tensors[f"{attention}.k_norm.weight"])
        self.qkv = merged(tensors, [f"{attention}.{part}_proj" for part in "qkv"])
        self.output = merged(tensors, [f"{attention}.o_proj"])
        self.gate_up = merged(tensors, [f"{mlp}.gate_proj", f"{mlp}.up_proj"])
        self.down = merged(tensors, [f"{mlp}.down_proj"])
        names = (f"{prefix}.attention_conv", f"{prefix}.mlp_conv")
        convolutions = [BlockConvolution(spec, tensors, name) if spec.conv_kernel else None for name in names]
        self.attention_conv, self.mlp_conv = convolutions
        self.layout = HeadLayout(spec.num_heads, query_norm=self.query_norm, key_norm=self.key_norm, eps=self.eps)
        # Context entries have keys and values only.
        self.context_layout = HeadLayout(0, key_norm=self.key_norm, eps=self.eps)

    def run(
        self,
        stream: torch.Tensor,
        update: torch.Tensor | None,
        rope: Rope,
        slots: torch.Tensor,
        cache: LayerCache,
        attention: StepAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer on stream + update [T, D]: its own stream and update. The block's K/V goes to `slots` [T]."""
        normed, stream = ops.add_rms_norm(stream, update, self.input_norm, self.eps)
        attended = self._attend(normed, rope, slots, cache, attention)
        normed, stream = ops.add_rms_norm(stream, attended, self.mlp_norm, self.eps)
        if self.mlp_conv is None:
            return stream, self._feed_forward(normed)
        before, after = self.mlp_conv.kernels(normed)
        return stream, self.mlp_conv(self._feed_forward(self.mlp_conv(normed, before)), after)

    def _attend(
        self, normed: torch.Tensor, rope: Rope, slots: torch.Tensor, cache: LayerCache, attention: StepAttention
    ) -> torch.Tensor:
        after = None
        if self.attention_conv is not None:
            before, after = self.attention_conv.kernels(normed)
            normed = self.attention_conv(normed, before)
        query = ops.head_norm_rope_write(self.qkv(normed), *rope, slots, cache, self.layout)
        attended = attention.attend(query, cache, scale=self.scale, window=self.window)
        out: torch.Tensor = self.output(attended.flatten(1))
        return out if self.attention_conv is None or after is None else self.attention_conv(out, after)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(ops.gated_activation(self.gate_up(x), self.activation))
        return out
