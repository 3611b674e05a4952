"""From the parts of a fused model to the constants of a native program; each says why where it can't."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import native
from engine.kernels.layout import HeadLayout
from engine.kernels.matrix import PackedMatrix
from engine.kernels.reference import ACTIVATIONS, gated_activation
from engine.kernels.step_program import NO_NORM, StepLayer, StepNorm, StepRope
from engine.models.fused.attention import FusedAttention
from engine.models.fused.backbone import FusedBackbone, RopeSource
from engine.models.fused.embedding import HalfEmbedding, PackedEmbedding
from engine.models.fused.layer import FusedLayer, Wiring
from engine.models.fused.mlp import FusedMLP
from engine.models.fused.parts import FusedNorm
from engine.runtime.linear import NativeLinear

_TOLERANCE = 1e-4  # of what a module computes against what it is taken for, relative to the largest value
_SCALES = (1.0, 1e-3, 16.0)  # of the inputs that it is tried on: small ones show epsilons, large ones clamps


class Unfit(Exception):
    """This part can't stand in a program; the text says why."""


def matrix_of(module: nn.Module | None) -> PackedMatrix:
    if type(module) is not NativeLinear:
        raise Unfit(f"a {type(module).__name__} is not packed for the native kernels")
    return module.matrix


def norm_of(module: nn.Module | None, width: int) -> StepNorm:
    """An RMS norm that was fused, a layer norm, or what computes the same as one. None is no norm."""
    if module is None:
        return NO_NORM
    if isinstance(module, FusedNorm):
        return StepNorm("rms", vector_of(module.weight), None, module.eps, module.offset)
    named = dict(module.named_parameters())
    if named.keys() <= {"weight", "bias"} and all(each.shape == (width,) for each in named.values()):
        weight, bias = (None if named.get(key) is None else vector_of(named[key]) for key in ("weight", "bias"))
        for eps in {value for value in vars(module).values() if isinstance(value, float) and 0.0 < value < 1e-2}:
            if _same(module, lambda x, eps=eps: F.layer_norm(x, (width,), weight, bias, eps), width):
                return StepNorm("layer", weight, bias, eps)
    raise Unfit(f"a {type(module).__name__} is a norm of another kind")


def layer_of(layer: nn.Module, rope: int, width: int) -> StepLayer:
    """`rope` is the index of its source, -1 for none."""
    if type(layer) is not FusedLayer:
        raise Unfit(f"a {type(layer).__name__} is not fused")
    if layer.reduce is not None:
        raise Unfit("its weights are one rank's slices")
    wiring, parts = _plainest(layer.wiring, layer, width), layer._modules
    attention = parts[wiring.attention]
    assert isinstance(attention, FusedAttention)
    pre_attention = norm_of(parts.get(wiring.pre_attention), width)
    shared = wiring.parallel and not wiring.pre_mlp
    up, down, activation, gated = _mlp(parts[wiring.mlp], width)
    return StepLayer(
        qkv=matrix_of(attention.qkv),
        out=matrix_of(attention.o_proj),
        up=up,
        down=down,
        layout=_layout(attention.layout),
        shape=attention.shape,
        activation=activation,
        attention_scale=attention.scale,
        pre_attention=pre_attention,
        post_attention=norm_of(parts.get(wiring.post_attention), width),
        pre_mlp=pre_attention if shared else norm_of(parts.get(wiring.pre_mlp), width),
        post_mlp=norm_of(parts.get(wiring.post_mlp), width),
        gated=gated,
        parallel=wiring.parallel,
        scale=wiring.scale,
        rope=rope,
        window=attention.window,
        softcap=attention.softcap,
        sinks=None if attention.sinks is None else vector_of(attention.sinks),
    )


def _plainest(wiring: Wiring, layer: FusedLayer, width: int) -> Wiring:
    """The same wiring, with a norm before the MLP told from a norm after it: the tensors of a pass fit both."""
    if wiring.pre_mlp or not wiring.post_mlp:
        return wiring
    try:
        norm_of(layer._modules[wiring.post_mlp], width)
    except Unfit:
        return replace(wiring, pre_mlp=wiring.mlp, mlp=wiring.post_mlp, post_mlp="")
    return wiring


def ropes_of(backbone: FusedBackbone, device: torch.device) -> list[StepRope]:
    return [rope_of(source, device) for source in backbone.sources]


def embedding_of(backbone: FusedBackbone) -> tuple[torch.Tensor | PackedMatrix | None, float]:
    """The table and what its rows are multiplied by; no table where the backbone has to embed by itself."""
    table, scale = table_of(backbone._modules[backbone.embedding])
    return (None, 1.0) if backbone.positions or table is None else (table, scale * backbone.embedding_scale)


def table_of(module: nn.Module | None) -> tuple[torch.Tensor | PackedMatrix | None, float]:
    """The table of an embedding and what its rows are multiplied by; no table for a module of another kind."""
    if type(module) is PackedEmbedding:
        return module.matrix, module.scale
    if type(module) is HalfEmbedding:
        return module.table, module.scale
    if type(module) is nn.Embedding and module.max_norm is None and native.fits(module.weight.detach()):
        return module.weight.detach(), 1.0
    return None, 1.0


def rope_of(source: RopeSource, device: torch.device) -> StepRope:
    cos, _ = source(torch.zeros(1, 1, dtype=torch.long, device=device))
    if cos.dtype is not torch.float32 or cos.shape[-1] % 2:
        raise Unfit("its rotary embedding is of another kind")
    if source.cos is None or source.sin is None:
        return StepRope(cos.shape[-1])
    return StepRope(cos.shape[-1], source.cos.contiguous(), source.sin.contiguous())


def _layout(layout: HeadLayout) -> HeadLayout:
    for weight in (layout.query_norm, layout.key_norm):
        if weight is not None and not native.plain(weight.detach()):
            raise Unfit("its head norms are of another kind")
    return layout


def _mlp(module: nn.Module | None, width: int) -> tuple[PackedMatrix, PackedMatrix, str, bool]:
    """First and last matrix, activation, and whether there is a gate."""
    if type(module) is FusedMLP:
        if not module.kind:
            raise Unfit("its MLP has an activation of another kind")
        return matrix_of(module.gate_up), matrix_of(module.down_proj), module.kind, True
    assert module is not None
    linears = [part for part in module.modules() if type(part) is NativeLinear]
    into = [part for part in linears if part.in_features == width]
    if len(linears) == 2 and into:
        up, down = (into[0], next(part for part in linears if part is not into[0]))
        if down.out_features == width and down.in_features == up.out_features:
            for kind in ACTIVATIONS:
                if _same(module, lambda x, kind=kind: _plain_mlp(x, up, down, kind), width):
                    return up.matrix, down.matrix, kind, False
    raise Unfit(f"a {type(module).__name__} is an MLP of another kind")


def _plain_mlp(x: torch.Tensor, up: NativeLinear, down: NativeLinear, kind: str) -> torch.Tensor:
    middle = up(x)
    return down(gated_activation(torch.cat((middle, torch.ones_like(middle)), dim=-1), kind))


def _same(module: nn.Module, formula: object, width: int) -> bool:
    """Whether a module computes a formula, on inputs [1, 5, width] of several sizes."""
    assert callable(formula)
    x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(11))
    for scale in _SCALES:
        want = module(x * scale)
        want = want[0] if isinstance(want, tuple) else want
        got = formula(x * scale)
        if not isinstance(want, torch.Tensor) or want.shape != got.shape:
            return False
        if not float((want - got).abs().max()) <= _TOLERANCE * float(want.abs().max()):
            return False
    return True


def vector_of(weight: torch.Tensor) -> torch.Tensor:
    found = weight.detach()
    if not native.plain(found):
        raise Unfit("a vector of its weights is not float32 in this machine's memory")
    return found
