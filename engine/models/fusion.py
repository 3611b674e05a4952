"""Fusion by structure: sub-modules of a `transformers` model are replaced where a faster form proves equal.

Merged query/key/value and gate/up projections and a direct path to the pool save most of what an eager
decoder layer spends outside its matrix products. A candidate is recognised by its parts, never by its family's
name; it is run on the inputs and against the output of the original, and is dropped if they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from engine.models.context import ForwardContext

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4  # of the largest output, in fp32


@dataclass(frozen=True, slots=True)
class AttendOptions:
    """The constants that the original attention module hands to its attention function."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class RecordingContext:
    """Passes calls on to another context and notes each layer's options."""

    def __init__(self, inner: ForwardContext) -> None:
        self._inner = inner
        self.options: dict[int, AttendOptions] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.options[layer] = AttendOptions(scale, window, softcap, sinks)
        return self._inner.attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split form: x [T, heads, dim], cos and signed_sin [T, 1, dim].

    x * cos + (-x2, x1) * sin, with the sign moved into the first half of `signed_sin`.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class FusedAttention(nn.Module):
    """Attention with one query/key/value product. Same call and result as the module it replaces."""

    def __init__(self, original: nn.Module, options: AttendOptions) -> None:
        super().__init__()
        self.layer_idx = _integer(original, "layer_idx")
        self.head_dim = _integer(original, "head_dim")
        self.options = options
        projections = [original.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv = merge_linears(projections)
        self.o_proj = original.get_submodule("o_proj")
        self.q_norm: nn.Module | None = getattr(original, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(original, "k_norm", None)
        self.heads = _integer(projections[0], "out_features") // self.head_dim
        self.kv_heads = _integer(projections[1], "out_features") // self.head_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        slipstream: ForwardContext,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [1, T, width] -> ([1, T, width], None)."""
        cos, sin = position_embeddings
        signed_sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        cos, signed_sin = cos[0].unsqueeze(1), signed_sin[0].unsqueeze(1)
        merged = self.qkv(hidden_states[0]).unflatten(-1, (-1, self.head_dim))  # [T, heads + 2 * kv_heads, dim]
        roped = self.heads + self.kv_heads
        value = merged[:, roped:]
        if self.q_norm is None or self.k_norm is None:
            both = rotate(merged[:, :roped], cos, signed_sin)
            query, key = both[:, : self.heads], both[:, self.heads :]
        else:
            query = rotate(self.q_norm(merged[:, : self.heads]), cos, signed_sin)
            key = rotate(self.k_norm(merged[:, self.heads : roped]), cos, signed_sin)
        options = self.options
        out = slipstream.attend(
            self.layer_idx,
            query,
            key,
            value,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )
        return self.o_proj(out.flatten(1)).unsqueeze(0), None


class FusedMLP(nn.Module):
    """down(act(gate x) * up x) with gate and up as one product. Same call and result as the module it replaces."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_up = merge_linears([original.get_submodule("gate_proj"), original.get_submodule("up_proj")])
        self.down_proj = original.get_submodule("down_proj")
        self.act_fn = original.get_submodule("act_fn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate).mul_(up))


def merge_linears(modules: list[nn.Module]) -> nn.Module:
    """One linear layer whose output is the outputs of `modules` (all nn.Linear), one after another."""
    tensors = [dict(module.named_parameters()) for module in modules]
    weight = torch.cat([own["weight"].data for own in tensors])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors[0], device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if "bias" in tensors[0]:
        merged.bias = nn.Parameter(torch.cat([own["bias"].data for own in tensors]), requires_grad=False)
    return merged


def _integer(module: nn.Module, name: str) -> int:
    value = getattr(module, name)
    assert isinstance(value, int)
    return value


def _are_linears(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether all named children are plain linear layers over one input that all have, or all lack, a bias."""
    layers = [getattr(module, name, None) for name in names]
    # Exactly nn.Linear: a subclass may do more than multiply.
    plain = [layer for layer in layers if isinstance(layer, nn.Linear) and type(layer) is nn.Linear]
    return len(plain) == len(names) and len({(layer.bias is None, layer.in_features) for layer in plain}) == 1


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that look like gated MLPs or rotary attention with separate projections, by name."""
    found = {}
    for name, module in model.named_modules():
        attention = _are_linears(module, ("q_proj", "k_proj", "v_proj")) and hasattr(module, "o_proj")
        mlp = (
            _are_linears(module, ("gate_proj", "up_proj"))
            and hasattr(module, "down_proj")
            and hasattr(module, "act_fn")
        )
        if (attention and hasattr(module, "head_dim") and hasattr(module, "layer_idx")) or mlp:
            found[name] = module
    return found


@torch.inference_mode()
def fuse(
    model: nn.Module,
    run: Callable[[ForwardContext], object],
    context: ForwardContext,
    finish: Callable[[nn.Module, nn.Module], object],
) -> int:
    """Replace what can be replaced, in place; the number of fused modules.

    `run(context)` does one forward pass of the whole model; it is called once, and every candidate is then
    compared on the inputs it saw there. `finish` gets each pair (original, fused) after
    they were compared (to pack the new weights and let go of the old ones).
    """
    recording = RecordingContext(context)
    calls: dict[str, tuple[tuple[object, ...], dict[str, object], object]] = {}
    hooks = []
    for name, module in _candidates(model).items():

        def record(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object, name: str = name
        ) -> None:
            calls.setdefault(name, (args, kwargs, out))

        hooks.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        run(recording)
    finally:
        for hook in hooks:
            hook.remove()
    fused = 0
    for name, call in calls.items():
        original = model.get_submodule(name)
        replacement = _replace(model, name, call, recording.options)
        if replacement is not None:
            finish(original, replacement)
            fused += 1
    return fused


def _replace(
    model: nn.Module,
    name: str,
    call: tuple[tuple[object, ...], dict[str, object], object],
    options: dict[int, AttendOptions],
) -> nn.Module | None:
    """Put a fused module in place of `name` if it gives the recorded output for the recorded input."""
    args, kwargs, expected = call
    original = model.get_submodule(name)
    try:
        if hasattr(original, "q_proj"):
            fused: nn.Module = FusedAttention(original, options[_integer(original, "layer_idx")])
        else:
            fused = FusedMLP(original)
        result = fused(*args, **kwargs)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        logger.info("not fused: %s (%s)", name, error)
        return None
    want = expected[0] if isinstance(expected, tuple) else expected
    got = result[0] if isinstance(result, tuple) else result
    assert isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=0.0, atol=TOLERANCE * float(want.abs().max())):
        logger.info("not fused: %s (its output differs)", name)
        return None
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, fused)
    return fused
