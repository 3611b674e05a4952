"""A fused module stands in only where it computes the same; what differs stays as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from engine.attention.sdpa import SdpaAttention
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, PagedContext
from engine.models.fusion import FusedAttention, FusedMLP, fuse, merge_linears, rotate
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import PagedKVCache
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def fuse_model(model: PreTrainedModel) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(modules fused, logits before, logits after), over nine tokens."""
    adapter = DecoderAdapter(model)
    cache = PagedKVCache(adapter.probe(), 1, 9, torch.float32, CPU)
    batch = pack([SeqInput(list(range(9)), 0, (0,), 9)], 9, CPU)
    context = PagedContext(cache, SdpaAttention().prepare(batch), batch.slots)

    def run(given: ForwardContext) -> torch.Tensor:
        return adapter.forward(batch.ids, batch.positions, torch.arange(9), given)

    before = run(context)
    fused = fuse(model, run, context, lambda *_: None)
    return fused, before, run(context)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_fused_model_gives_the_same_logits(family: str) -> None:
    model = tiny_model(family)
    fused, before, after = fuse_model(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FusedAttention) == 4 and kinds.count(FusedMLP) == 4 and fused == 8
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)


def test_module_that_computes_something_else_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Right parts, another formula: it looks fusible and must not be."""
    model = tiny_model("llama")
    layers = model.get_submodule("model.layers")
    attention, mlp = layers[1].self_attn, layers[2].mlp  # type: ignore[index]

    class Doubled(type(attention)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
            out, weights = super().forward(*args, **kwargs)
            return out * 1.01, weights

    class Shifted(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.01

    attention.__class__, mlp.__class__ = Doubled, Shifted
    with caplog.at_level(logging.INFO):
        fused, before, after = fuse_model(model)
    assert fused == 6
    assert "model.layers.1.self_attn (its output differs)" in caplog.text
    assert "model.layers.2.mlp (its output differs)" in caplog.text
    assert layers[1].self_attn is attention and layers[2].mlp is mlp  # type: ignore[index]
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)


def test_merged_linears_are_the_linears_side_by_side() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        parts: list[nn.Module] = [nn.Linear(6, size, bias=bias) for size in (4, 2, 3)]
        x = torch.randn(5, 6)
        expected = torch.cat([part(x) for part in parts], dim=-1)
        torch.testing.assert_close(merge_linears(parts)(x), expected, rtol=0, atol=1e-6)


def test_rotation_is_a_rotation_of_halves() -> None:
    """Each pair (x_i, x_{i + d/2}) turns by its angle."""
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 8), torch.rand(3, 1, 4) * 6
    cos, sin = angles.cos(), angles.sin()
    got = rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    low, high = x[..., :4], x[..., 4:]
    expected = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    torch.testing.assert_close(got, expected)
