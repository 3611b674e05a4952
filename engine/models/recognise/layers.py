"""How the parts of a decoder layer are wired: by following the tensors of a recorded pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from engine.models.fused.attention import FusedAttention
from engine.models.fused.layer import FusedLayer, Wiring
from engine.models.recognise.compare import close_update, equal
from engine.models.recognise.contexts import ProbingContext
from engine.models.recognise.trace import FAILURES, Call, Trace


def find_layer(name: str, module: nn.Module, trace: Trace) -> FusedLayer | None:
    """A fused layer that computes what `module`, whose attention is fused already, does; or None."""
    attention = [key for key, child in module.named_children() if isinstance(child, FusedAttention)]
    call = trace.only(name)
    if len(attention) != 1 or call is None or call.hidden is None or call.hidden.dim() != 3 or call.result is None:
        return None
    if isinstance(call.output, tuple) and len(call.output) != 1:
        return None
    given, made = {}, {}
    for key, _ in module.named_children():
        if f"{name}.{key}" in trace.calls:
            child = trace.only(f"{name}.{key}")
            if child is None or child.hidden is None or child.result is None or child.result.shape != call.hidden.shape:
                return None
            if not equal(child.hidden, child.result):  # else a dropout, at rest
                given[key], made[key] = child.hidden, child.result
    if attention[0] not in given:
        return None
    seen = Evidence(call.hidden, call.result, given, made, attention[0])
    own = (value for value in vars(module).values() if isinstance(value, float) and value > 0)
    for scale in dict.fromkeys((1.0, *own)):
        for wiring in _wirings(seen, scale):
            fused = FusedLayer(module, wiring, isinstance(call.output, tuple))
            if _agree(module, fused, call):
                return fused
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What went into and came out of a layer and each of its children, in one recorded pass. All [1, T, width]."""

    x: torch.Tensor
    out: torch.Tensor
    given: dict[str, torch.Tensor]
    made: dict[str, torch.Tensor]
    attention: str

    def before(self, name: str, source: torch.Tensor) -> list[str]:
        """The norms between `source` and what the child `name` was given; "" where that is `source` itself."""
        found = [""] if equal(source, self.given[name]) else []
        norms = (key for key in self.given if key not in (self.attention, name))
        return found + [k for k in norms if equal(self.given[k], source) and equal(self.made[k], self.given[name])]

    def after(self, name: str) -> list[tuple[str, torch.Tensor]]:
        """What may be added for the child `name`: its output as it is, or through a norm."""
        norms = [k for k in self.given if k != self.attention and equal(self.given[k], self.made[name])]
        return [("", self.made[name]), *((key, self.made[key]) for key in norms)]

    def shows(self, wiring: Wiring, out: torch.Tensor) -> bool:
        """Whether a wiring uses every child that was called, and leads to the output."""
        norms = (wiring.pre_attention, wiring.post_attention, wiring.pre_mlp, wiring.post_mlp)
        used = sorted(filter(None, (wiring.attention, wiring.mlp, *norms)))
        return used == sorted(self.given) and close_update(out[0], self.out[0], self.x[0])


def _wirings(seen: Evidence, scale: float) -> Iterator[Wiring]:
    """All ways in which the recorded tensors fit `Wiring`."""
    attention = seen.attention
    for mlp, pre in product(seen.given, seen.before(attention, seen.x)):
        if mlp == attention:
            continue
        both = _plus(seen.made[attention], seen.made[mlp], 1.0)
        shared = equal(seen.given[mlp], seen.given[attention])
        for pre_mlp in [""] if shared else seen.before(mlp, seen.x):
            wiring = Wiring(attention, mlp, pre, "", pre_mlp, "", parallel=True, scale=scale)
            if seen.shows(wiring, _plus(seen.x, both, scale)):
                yield wiring
        for post, update in seen.after(attention):
            middle = _plus(seen.x, update, scale)
            for pre_mlp, (post_mlp, last) in product(seen.before(mlp, middle), seen.after(mlp)):
                wiring = Wiring(attention, mlp, pre, post, pre_mlp, post_mlp, parallel=False, scale=scale)
                if seen.shows(wiring, _plus(middle, last, scale)):
                    yield wiring


def _plus(x: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    return x + (update if scale == 1.0 else update * scale)


def _agree(module: nn.Module, fused: FusedLayer, call: Call) -> bool:
    """Both do the same with the same attention and MLP."""
    doubled = call.doubled()
    try:
        want, got = (doubled.again(candidate, ProbingContext()) for candidate in (module, fused))
    except FAILURES:
        return False
    if isinstance(want, tuple) and isinstance(got, tuple):
        want, got = want[0], got[0]
    assert isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor) and doubled.hidden is not None
    return close_update(got[0], want[0], doubled.hidden[0])
