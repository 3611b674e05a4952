"""Which modules are RMS norms, whatever they are called."""

from __future__ import annotations

import torch
from torch import nn

from engine.models.fused.parts import FusedNorm
from engine.models.recognise.compare import close_each
from engine.models.recognise.trace import LARGE, Call

SMALL = 1e-3  # inputs times this show epsilons


def find_norm(module: nn.Module, call: Call) -> FusedNorm | None:
    """A fused norm that computes what `module` does, or None.

    It has at most one parameter, a vector as long as the input's last dimension, and one of its numbers is the epsilon.
    It is compared on the recorded input, and on small and large ones, where epsilons and clamps show.
    """
    x, out = call.hidden, call.result
    if x is None or out is None or x.shape != out.shape or not x.is_floating_point():
        return None
    if len(call.args) != 1 or call.kwargs:
        return None
    parameters = dict(module.named_parameters())
    if list(module.children()) or any(True for _ in module.buffers()) or len(parameters) > 1:
        return None
    weight = parameters.get("weight")
    if weight is None:
        if parameters:
            return None
        weight = nn.Parameter(torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), requires_grad=False)
    if weight.shape != x.shape[-1:]:
        return None
    inputs = [x, x * SMALL, x * LARGE]
    wanted = [module(value) for value in inputs]
    for eps in {value for value in vars(module).values() if isinstance(value, float) and 0.0 <= value < 1e-2}:
        for offset in (0.0, 1.0):
            fused = FusedNorm(weight, eps, offset)
            if all(close_each(fused(value), want) for value, want in zip(inputs, wanted, strict=True)):
                return fused
    return None
