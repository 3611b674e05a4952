"""Fusion by structure: parts of a `transformers` model are replaced where a faster form proves equal.

What makes a decoder layer slow besides its matrix products is everything around them: dozens of small operations, and
Python between them. A candidate is recognised by its parts and by the tensors of one recorded pass, never by its
family's name; it is compared with the original and dropped if they differ. Each level stands on the one before, and
what is not recognised stays as it is, as the levels below it left it:

1. norms, attention (one product for query, key and value; norms, rotation and KV write in one operation) and gated
   MLPs, in place of the originals;
2. decoder layers, which leave each sum to the next norm;
3. the backbone: one loop from token ids to the last hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

from engine.models.context import ForwardContext
from engine.models.fused.attention import FusedAttention
from engine.models.fused.backbone import FusedBackbone
from engine.models.fused.layer import FusedLayer
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import FusedNorm, Reduce
from engine.models.recognise.attention import find_attention
from engine.models.recognise.backbone import find_backbone
from engine.models.recognise.layers import find_layer
from engine.models.recognise.mlp import find_mlp
from engine.models.recognise.norms import find_norm
from engine.models.recognise.record import record
from engine.models.recognise.trace import Trace
from engine.models.support import context_length

logger = logging.getLogger(__name__)
LEVELS: dict[str, type[nn.Module]] = {
    "backbone": FusedBackbone,
    "layers": FusedLayer,
    "attention": FusedAttention,
    "MLPs": FusedMLP,
    "norms": FusedNorm,
}


@torch.inference_mode()
def fuse(
    model: nn.Module,
    run: Callable[[ForwardContext], object],
    context: ForwardContext,
    finish: Callable[[nn.Module, nn.Module], object],
) -> int:
    """Replace what can be replaced, in place; the number of fused modules. `fused_levels` tells them apart.

    `run(context)` does one forward pass of the whole model; it is called once. Its positions should span the context:
    what changes at far positions only would be missed otherwise. `finish` gets each pair (original, fused) that has
    new weights after they were compared (to pack them and let go of the old ones). A model can be fused once.
    """
    assert not fused_levels(model)
    trace = record(model, run, context)
    for name, module in list(model.named_modules()):
        calls = trace.calls.get(name)
        if calls and not _is_hooked(module):
            _replace(model, name, find_norm(module, calls[0]))
    for name, module in list(model.named_modules()):
        if name in trace.calls and not isinstance(module, FusedNorm) and not _is_hooked(module):
            fused = _find_block(name, module, trace, model, context)
            if fused is not None and _replace(model, name, fused):
                finish(module, fused)
    for name, module in list(model.named_modules()):
        if _holds(module, FusedAttention) and not _is_hooked(module, below=False):
            _replace(model, name, find_layer(name, module, trace))
    for name, module in list(model.named_modules()):
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if any(_holds(layers, FusedLayer) for layers in lists) and not _is_hooked(module, below=False):
            _replace(model, name, find_backbone(name, module, trace, context, _length(model)))
    return sum(fused_levels(model).values())


def fused_levels(model: nn.Module) -> dict[str, int]:
    """How many modules of each level are fused, the highest first."""
    counts = {level: sum(type(module) is kind for module in model.modules()) for level, kind in LEVELS.items()}
    return {level: count for level, count in counts.items() if count}


def set_reduce(model: nn.Module, reduce: Reduce | None) -> None:
    """Have every fused layer pass what its attention and MLP return through `reduce` before it is added to the stream.

    Where weights are one rank's slices, that is the sum over ranks (and their first rank alone holds the biases).
    """
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.reduce = reduce


def _find_block(
    name: str, module: nn.Module, trace: Trace, model: nn.Module, context: ForwardContext
) -> FusedAttention | FusedMLP | None:
    if name not in trace.attends:
        return find_mlp(name, module, trace, model)
    attention = find_attention(name, module, trace, model, context)
    if attention is None:
        logger.info("not fused: %s (attention of another kind)", name)
    return attention


def _replace(model: nn.Module, name: str, fused: nn.Module | None) -> bool:
    """Put `fused` in the place of a module; False if there is none, or the model itself is that module."""
    parent, _, child = name.rpartition(".")
    if fused is None or not name:
        return False
    fused.eval()
    setattr(model.get_submodule(parent), child, fused)
    return True


def _is_hooked(module: nn.Module, below: bool = True) -> bool:
    """Whether someone listens to this module, or to one in it: a replacement would never call them."""
    parts = module.modules() if below else (module,)
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(child, kind) for child in module.children())


def _length(model: nn.Module) -> int:
    """Positions that one sequence may have."""
    config = getattr(model, "config", None)
    return context_length(config) if isinstance(config, PretrainedConfig) else 0
