"""Hidden states of one pass, by hooks: after given layers, where the backbone is not fused, and before the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.models.context import Taps


@contextmanager
def tapped(model: nn.Module, taps: Taps | None) -> Iterator[None]:
    """Within this, a forward pass of `model` fills `taps`."""
    hooks = []
    try:
        if taps is not None and taps.layers:
            layers = decoder_layers(model)
            for index in sorted(taps.layers):

                def keep(_: nn.Module, __: tuple[object, ...], output: object, index: int = index) -> None:
                    state = output[0] if isinstance(output, tuple) else output
                    assert isinstance(state, torch.Tensor)
                    taps.states[index] = state[0]

                hooks.append(layers[index].register_forward_hook(keep))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def head_inputs(head: nn.Module, scored: int | None = None) -> Iterator[list[torch.Tensor]]:
    """Within this, the list gains what `head` is given, [..., rows, width], whenever it is called.

    It reads the first `scored` rows of that, or all.
    """
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
        given = inputs[0]
        assert isinstance(given, torch.Tensor)
        found.append(given)
        if scored is None or given.shape[-2] <= scored:
            return None
        return given[..., :scored, :].contiguous(), *inputs[1:]

    hook = head.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the outermost list in which every module has an attention layer's index below it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_attends(layer) for layer in module):
            return module
    raise ValueError("this model has no list of decoder layers")


def _attends(layer: nn.Module) -> bool:
    return any(hasattr(part, "layer_idx") for part in layer.modules())
