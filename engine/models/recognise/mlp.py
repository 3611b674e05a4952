"""Which modules are gated feed-forward networks, whatever they and their parts are called."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.kernels import reference
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import merge_linears
from engine.models.recognise.compare import close, close_each, equal
from engine.models.recognise.trace import LARGE, Call, Trace


def is_linear(module: nn.Module) -> bool:
    """Exactly a linear layer: a subclass may do more than multiply."""
    return type(module) in (nn.Linear, Conv1D)


def linears_of(name: str, module: nn.Module, trace: Trace) -> dict[str, Call]:
    """The linear layers in `module` that were called once, by their full names."""
    found = {}
    for child_name, child in module.named_modules(prefix=name):
        call = trace.only(child_name)
        if is_linear(child) and call is not None and call.hidden is not None and call.result is not None:
            found[child_name] = call
    return found


def find_mlp(name: str, module: nn.Module, trace: Trace, model: nn.Module) -> FusedMLP | None:
    """A fused MLP that computes what `module` does, or None. Two or three linear layers, and an activation between."""
    call = trace.only(name)
    if call is None or call.hidden is None or not isinstance(call.output, torch.Tensor) or len(call.args) != 1:
        return None
    linears = linears_of(name, module, trace)
    if len(linears) not in (2, 3) or len(linears) != sum(is_linear(part) for part in module.modules()):
        return None
    first = [key for key, each in linears.items() if equal(each.hidden, call.hidden)]
    last = [key for key, each in linears.items() if equal(each.result, call.output) and key not in first]
    if len(last) != 1 or len(first) != len(linears) - 1:
        return None
    down = linears[last[0]].hidden
    outputs = [linears[key].result for key in first]
    assert down is not None
    halves = torch.cat([out for out in outputs if out is not None], dim=-1).split(down.shape[-1], dim=-1)
    if len(halves) != 2 or halves[0].shape != halves[1].shape:
        return None
    activations = [
        part
        for part_name, part in module.named_modules(prefix=name)
        if trace.only(part_name) is not None and not list(part.children()) and not is_linear(part)
    ]
    for swapped in (False, True):
        gate, up = halves[::-1] if swapped else halves
        chosen = _activation(gate, up, down, activations)
        if chosen is not None:
            fused = _build([model.get_submodule(key) for key in first], model.get_submodule(last[0]), swapped, *chosen)
            return fused if _agree(module, fused, call.hidden) else None
    return None


def _activation(
    gate: torch.Tensor, up: torch.Tensor, want: torch.Tensor, modules: list[nn.Module]
) -> tuple[str, nn.Module | None] | None:
    """What makes act(gate) * up = want: the name of a known function, or a module; the closest that fits."""
    both = torch.cat((gate, up), dim=-1)
    fits: list[tuple[float, str, nn.Module | None]] = []
    for kind in reference.ACTIVATIONS:
        fits.append((_distance(reference.gated_activation(both, kind), want), kind, None))
    for module in modules:
        fits.append((_distance(module(gate) * up, want), "", module))
    error, kind, other = min(fits, key=lambda fit: fit[0])
    return (kind, other) if error != float("inf") else None


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Mean difference, infinite where the two are not the same but for rounding."""
    return float((got.float() - want.float()).abs().mean()) if close_each(got, want) else float("inf")


def _build(first: list[nn.Module], down: nn.Module, swapped: bool, kind: str, module: nn.Module | None) -> FusedMLP:
    if len(first) == 1 and not swapped:
        return FusedMLP(first[0], down, kind, module)
    if len(first) == 2:
        return FusedMLP(merge_linears(first[::-1] if swapped else first), down, kind, module)
    merged = merge_linears(first)
    order = torch.arange(merged.out_features, device=merged.weight.device).roll(merged.out_features // 2)
    return FusedMLP(merge_linears(first, order), down, kind, module)


def _agree(module: nn.Module, fused: FusedMLP, x: torch.Tensor) -> bool:
    """For the recorded input and a larger one, which shows clamps; twice the tokens, which shows if they count."""
    both = torch.cat((x, x * LARGE), dim=-2)
    got, want = fused(both), module(both)
    return close(got.flatten(0, -2), want.flatten(0, -2))
