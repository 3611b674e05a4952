"""How a model leads from token ids to its last hidden states: embedding, layers, final norm, and whence cos and sin."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from engine.models.context import ForwardContext
from engine.models.fused.attention import FusedAttention, RopeForm
from engine.models.fused.backbone import FusedBackbone, RopeSource
from engine.models.fused.layer import FusedLayer
from engine.models.recognise.compare import close, equal
from engine.models.recognise.trace import FAILURES, Call, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """One call of a rotary embedding by a model's forward."""

    module: nn.Module
    call: Call
    positions: torch.Tensor

    def source(self, form: RopeForm) -> RopeSource:
        """The same call for other positions."""

        def compute(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            args = [positions if equal(value, self.positions) else value for value in self.call.args]
            named = self.call.kwargs.items()
            kwargs = {key: positions if equal(value, self.positions) else value for key, value in named}
            return self.module(*args, **kwargs)

        return RopeSource(compute, form)


@dataclass(slots=True, eq=False)
class Pass:
    """What is known of a recorded pass through a backbone; the names of its children by what they do."""

    ids: torch.Tensor
    positions: torch.Tensor
    layer_calls: list[Call]
    last: torch.Tensor  # last_hidden_state
    layers: str
    embedding: str = ""
    embedded: torch.Tensor | None = None
    absolute: str = ""
    placed: torch.Tensor | None = None  # the embedding of the positions
    norm: str = ""
    rotary: list[Rotary] = field(default_factory=list)


def find_backbone(
    name: str, module: nn.Module, trace: Trace, context: ForwardContext, length: int
) -> FusedBackbone | None:
    """A fused backbone that computes what `module`, all of whose layers are fused, does; or None.

    cos and sin are tabulated for `length` positions.
    """
    call, seen = trace.only(name), _pass(name, module, trace)
    if call is None or seen is None or not _place_children(seen, name, module, trace):
        return None
    scale = _embedding_scale(seen, module)
    if scale is None:
        return None
    fused = FusedBackbone(module, seen.layers, seen.embedding, seen.norm, seen.absolute, scale)
    fused.output_type = type(call.output)
    if not _set_ropes(fused, module, seen, length):
        return None
    return fused if _agree(module, fused, call, context) else None


def _pass(name: str, module: nn.Module, trace: Trace) -> Pass | None:
    """The pass through `module`, if all its layers are fused and each one's output is the next one's input."""
    lists = [
        (key, child)
        for key, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and all(isinstance(layer, FusedLayer) for layer in child)
    ]
    call = trace.only(name)
    if len(lists) != 1 or call is None:
        return None
    ids = call.args[0] if call.args else call.kwargs.get("input_ids")
    positions = call.kwargs.get("position_ids")
    last = getattr(call.output, "last_hidden_state", None)
    found = [trace.only(f"{name}.{lists[0][0]}.{index}") for index in range(len(lists[0][1]))]
    calls = [each for each in found if each is not None]
    chained = all(equal(one.result, other.hidden) for one, other in pairwise(calls))
    if len(calls) < len(found) or not chained:
        return None
    if isinstance(ids, torch.Tensor) and isinstance(positions, torch.Tensor) and isinstance(last, torch.Tensor):
        return Pass(ids, positions, calls, last, lists[0][0])
    return None


def _place_children(seen: Pass, name: str, module: nn.Module, trace: Trace) -> bool:
    """Find what each child that was called does; False if one does something else."""
    inside = f"{name}.{seen.layers}."
    for key, child in module.named_modules(prefix=name):
        for call in trace.calls.get(key, []):
            given = (*call.args, *call.kwargs.values())
            pair = isinstance(call.output, tuple) and len(call.output) == 2
            if pair and any(equal(value, seen.positions) for value in given) and not key.startswith(inside):
                seen.rotary.append(Rotary(child, call, seen.positions))
    rotary = {id(each.module) for each in seen.rotary}
    for key, child in module.named_children():
        for call in trace.calls.get(f"{name}.{key}", []) if id(child) not in rotary else []:
            if equal(call.hidden, call.result):  # a dropout, at rest
                continue
            if equal(call.hidden, seen.ids) and not seen.embedding:
                seen.embedding, seen.embedded = key, call.result
            elif isinstance(child, nn.Embedding) and equal(call.hidden, seen.positions) and not seen.absolute:
                seen.absolute, seen.placed = key, call.result
            elif equal(call.hidden, seen.layer_calls[-1].result) and equal(call.result, seen.last):
                seen.norm = key
            else:
                return False
    return bool(seen.embedding and seen.norm)


def _embedding_scale(seen: Pass, module: nn.Module) -> float | None:
    """The number that embeddings are multiplied by: 1, or one of the backbone's own."""
    assert seen.embedded is not None
    own = (value for value in vars(module).values() if isinstance(value, float))
    for scale in dict.fromkeys((1.0, *own)):
        first = seen.embedded if scale == 1.0 else seen.embedded * scale
        if equal(first if seen.placed is None else first + seen.placed, seen.layer_calls[0].hidden):
            return scale
    return None


def _set_ropes(fused: FusedBackbone, module: nn.Module, seen: Pass, length: int) -> bool:
    """Give every layer that rotates its source of cos and sin; False if one's source is unknown."""
    known: dict[tuple[int, RopeForm], int] = {}
    for layer, call in zip(module.get_submodule(seen.layers).children(), seen.layer_calls, strict=True):
        (attention,) = (child for child in layer.children() if isinstance(child, FusedAttention))
        form, given = attention.rope_form, call.kwargs.get("position_embeddings")
        if form is RopeForm.NONE:
            fused.rope_of.append(-1)
            continue
        made = [index for index, rotary in enumerate(seen.rotary) if _same_pair(rotary.call.output, given)]
        if not made:
            return False
        if (made[0], form) not in known:
            known[made[0], form] = len(fused.sources)
            fused.sources.append(seen.rotary[made[0]].source(form))
            fused.sources[-1].tabulate(length, seen.ids.device)
        fused.rope_of.append(known[made[0], form])
    return True


def _same_pair(one: object, other: object) -> bool:
    if not isinstance(one, tuple) or not isinstance(other, tuple) or len(one) != 2 or len(other) != 2:
        return False
    return equal(one[0], other[0]) and equal(one[1], other[1])


def _agree(module: nn.Module, fused: FusedBackbone, call: Call, context: ForwardContext) -> bool:
    """Over the pool, with the same layers, both give the same last hidden states."""
    try:
        want, got = (call.again(candidate, context) for candidate in (module, fused))
    except FAILURES:
        return False
    wanted, given = getattr(want, "last_hidden_state", None), getattr(got, "last_hidden_state", None)
    return isinstance(wanted, torch.Tensor) and isinstance(given, torch.Tensor) and close(given[0], wanted[0])
