"""The matrix products of passes that were run, alone: what a machine needs for them at best, with the served weights.

A run is watched once: which layer multiplied how many rows, in which order. Played back, each product runs by itself on
as many rows of random numbers, with the very layer that was served, packed or not, in one call as it was then.
The two products of attention, which have no weights, are played as plain batched ones over as many queries and keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from benchmarks.step_ceilings import synchronize
from benchmarks.step_parts import Parts, is_matrix_product
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Product:
    """One call of a layer with an input of this shape."""

    layer: nn.Module
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Products:
    """What a watched run multiplied. `rows` of each pass, and how many of them the head scored."""

    runners: list[ModelRunner] = field(default_factory=list)
    calls: list[Product] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    pairs: list[tuple[ModelRunner, int, int]] = field(default_factory=list)  # queries and keys, by sequence and pass

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return sum(2.0 * _rows(one.shape) * one.shape[-1] * _width(one.layer) for one in self.calls)

    @torch.inference_mode()
    def play(self) -> float:
        """Seconds that all of them take by themselves."""
        device = self.runners[0].adapter.device
        kinds = {(one.shape, one.dtype) for one in self.calls}
        inputs = {(shape, dtype): torch.randn(shape, dtype=dtype, device=device) for shape, dtype in kinds}
        synchronize(device)
        began = time.perf_counter()
        for one in self.calls:
            one.layer(inputs[one.shape, one.dtype])
        synchronize(device)
        return time.perf_counter() - began

    @torch.inference_mode()
    def play_attention(self) -> float:
        """Seconds that queries times keys, and as many weights times values, take in all layers by themselves."""
        inputs: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
        calls = []
        for runner, queries, keys in self.pairs:
            heads = int(runner.adapter.model.config.num_attention_heads)
            for layer in runner.cache.layers:
                key = heads, queries, keys, layer.shape.key_dim, layer.shape.value_dim
                if key not in inputs:
                    inputs[key] = _attention_inputs(*key, runner.adapter.device)
                calls.append(inputs[key])
        synchronize(self.runners[0].adapter.device)
        began = time.perf_counter()
        for query, key_, weights, value in calls:
            torch.matmul(query, key_)
            torch.matmul(weights, value)
        synchronize(self.runners[0].adapter.device)
        return time.perf_counter() - began

    def profile(self, run: Callable[[], object]) -> dict[str, float]:
        """Seconds of a run by part, with a watch in it: the network's own parts, and all that is not the network."""
        runner, forward, inside = self.runners[0], ModelRunner.forward, [0.0]

        def watched(*given: object, **named: object) -> torch.Tensor:
            began = time.perf_counter()
            out = cast(Callable[..., torch.Tensor], forward)(*given, **named)
            inside[0] += time.perf_counter() - began
            return out

        with Parts(runner, runner.adapter.device) as parts, _instead(watched):
            split = parts.step(run, 1.0)
        products, attention = split.parts["gemm"], split.parts["attention"]
        network = {"products": products, "attention": attention, "network's rest": inside[0] - products - attention}
        return network | {"choosing and scheduling": split.device - inside[0]}


@contextmanager
def watching() -> Iterator[Products]:
    """Write down the products of all passes of this process."""
    seen, hooks = Products(), list[torch.utils.hooks.RemovableHandle]()
    forward = ModelRunner.forward

    def watched(
        runner: ModelRunner,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> torch.Tensor:
        if runner not in seen.runners:
            seen.runners.append(runner)
            hooks.extend(_hook(runner.adapter.model, seen))
        seen.rows.append(sum(len(one.ids) for one in inputs))
        seen.scored.append(len(rows))
        seen.pairs.extend((runner, len(one.ids), one.kv_len) for one in inputs)
        return forward(runner, inputs, rows, mode, block_length)

    with _instead(watched):
        try:
            yield seen
        finally:
            for handle in hooks:
                handle.remove()


@contextmanager
def _instead(watched: Callable[..., torch.Tensor]) -> Iterator[None]:
    """All runners of this process pass through `watched` meanwhile."""
    forward = ModelRunner.forward
    setattr(ModelRunner, "forward", watched)  # noqa: B010  # a method is no variable to assign to
    try:
        yield
    finally:
        setattr(ModelRunner, "forward", forward)  # noqa: B010


def _hook(model: nn.Module, seen: Products) -> list[torch.utils.hooks.RemovableHandle]:
    def note(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        x = cast(torch.Tensor, inputs[0])
        seen.calls.append(Product(layer, tuple(x.shape), x.dtype))

    return [module.register_forward_pre_hook(note) for module in model.modules() if is_matrix_product(module)]


def _attention_inputs(
    heads: int, queries: int, keys: int, key_dim: int, value_dim: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    shapes = (queries, key_dim), (key_dim, keys), (queries, keys), (keys, value_dim)
    return tuple(torch.randn(heads, *shape, device=device) for shape in shapes)


def _rows(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape[:-1]).numel())


def _width(layer: nn.Module) -> int:
    """Columns of what it puts out."""
    packed = getattr(layer, "out_features", None)
    return int(packed) if packed is not None else len(cast(torch.Tensor, layer.weight))
