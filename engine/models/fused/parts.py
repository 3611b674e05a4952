"""What all fused modules are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import nn

from engine.kernels import ops

Rope = tuple[torch.Tensor | None, torch.Tensor | None]  # cos and sin [T, r], each at its dimension; or no rotation
NO_ROPE: Rope = (None, None)


class FusedPart(nn.Module):
    """A module that a fused layer runs without calling it as a module: hooks would never run, so they are refused.

    Decoder layers, the backbone and linear layers are called as modules wherever they have hooks.
    """

    def register_forward_hook(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__} runs inside a fused layer, where its hooks would not be called; hook the decoder "
            "layer or one of its linear layers, or ask the adapter for taps"
        )

    def register_forward_pre_hook(self, *_: object, **__: object) -> NoReturn:
        self.register_forward_hook()


class FusedNorm(FusedPart):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in one operation."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> the same shape and dtype."""
        normed, _ = ops.add_rms_norm(x.reshape(-1, x.shape[-1]), None, self.weight, self.eps, self.offset)
        return normed.view(x.shape)


def add_norm(
    norm: nn.Module | None, stream: torch.Tensor, update: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(stream + update), stream + update), all [T, width].

    `stream` is never written to: whoever holds a layer's output keeps it. `update` is.
    """
    if type(norm) is FusedNorm:
        return ops.add_rms_norm(stream, update, norm._parameters["weight"], norm.eps, norm.offset)  # type: ignore[arg-type]
    if update is not None:
        stream = update.add_(stream)
    return (stream if norm is None else norm(stream)), stream


def merge_linears(modules: list[nn.Module], rows: torch.Tensor | None = None) -> nn.Linear:
    """One linear layer whose output is the outputs of `modules`, one after another; `rows` reorders that output.

    The modules are nn.Linear or Conv1D over one input, and all have, or all lack, a bias. Sizes are those of the
    weights as they are, which may be one rank's slice.
    """
    weights, biases = [], []
    for module in modules:
        own = dict(module.named_parameters())
        weights.append(own["weight"].data if isinstance(module, nn.Linear) else own["weight"].data.T)
        if "bias" in own:
            biases.append(own["bias"].data)
    weight = torch.cat(weights) if rows is None else torch.cat(weights)[rows]
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    merged.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if biases:
        merged.bias = nn.Parameter(torch.cat(biases) if rows is None else torch.cat(biases)[rows], requires_grad=False)
    return merged


Reduce = Callable[[torch.Tensor], torch.Tensor]
