"""What is fused, at which level, and that a fused module stands in only where it computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from engine.attention.paged_cpu import PagedCpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext, PagedContext
from engine.models.fused.attention import RopeForm
from engine.models.fused.backbone import MAX_TABLE_BYTES, FusedBackbone, RopeSource
from engine.models.fused.parts import merge_linears
from engine.models.fusion import fuse, fused_levels
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import PagedKVCache
from tests.contract import paged
from tests.families import CONTEXT, LAYERS, VOCAB, family, random_model

WHOLE = {"backbone": 1, "layers": LAYERS, "attention": LAYERS}
# One norm before attention and MLP and one at the end: 2 n + 1; one more for each of post-norms and q/k norms.
TWO, FOUR, SIX = 2 * LAYERS + 1, 4 * LAYERS + 1, 6 * LAYERS + 1
LEVELS = {
    "llama": WHOLE | {"MLPs": LAYERS, "norms": TWO},
    "llama-tied": WHOLE | {"MLPs": LAYERS, "norms": TWO},
    "qwen2": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # biases of q, k, v alone
    "qwen3": WHOLE | {"MLPs": LAYERS, "norms": FOUR},  # q/k norms per head
    "minimax_m2": WHOLE | {"norms": FOUR},  # q/k norms over all heads, experts
    "gemma": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # 1 + weight, scaled embedding, tanh GELU
    "gemma2": WHOLE | {"MLPs": LAYERS, "norms": FOUR},  # norms after the blocks, soft caps, windows
    "gemma3_text": WHOLE | {"MLPs": LAYERS, "norms": SIX},  # all of these, and two rotary embeddings
    "phi3": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # merged as they come, half of the dimensions rotated
    "olmo2": WHOLE | {"MLPs": LAYERS, "norms": FOUR},  # norms after the blocks only, q/k norms over all heads
    "cohere2": WHOLE | {"MLPs": LAYERS},  # parallel, layer norms, rotated neighbours, a layer without rotation
    "granite": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # residuals and embedding times a number
    "glm4": WHOLE | {"MLPs": LAYERS, "norms": FOUR},  # half of the dimensions rotated, as neighbours
    "ernie4_5": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # neighbours from half-split tables
    "smollm3": WHOLE | {"MLPs": LAYERS, "norms": TWO},  # a layer without rotation
    "gpt_neox": WHOLE,  # parallel with two norms, q/k/v merged head by head, layer norms, plain MLP
    "gpt2": WHOLE,  # Conv1D, absolute positions
    "gpt_bigcode": WHOLE,  # one key/value head
    "mixtral": WHOLE | {"norms": TWO},  # experts stay as they are
    "qwen3_moe": WHOLE | {"MLPs": 1, "norms": FOUR},  # experts in all layers but one
    "gpt_oss": WHOLE | {"norms": TWO},  # sinks; its rotary tables hold half of the values
    "olmo": {"MLPs": LAYERS},  # clips queries, keys and values
    "ministral3": {"MLPs": LAYERS, "norms": TWO},  # scales queries by position, past the original context
}


class Fusion:
    """A model before and after it was fused, as the worker does it, through packed mixed batches over the pool."""

    def __init__(self, model: PreTrainedModel) -> None:
        adapter, backend, ids = DecoderAdapter(model), PagedCpuAttention(), paged.sequences(VOCAB)
        shapes = adapter.probe()
        before = paged.paged(adapter, shapes, backend, ids)
        self.count = paged.fuse_in_place(adapter, shapes, backend)
        self.levels = fused_levels(model)
        self.error = paged.worst(before, paged.paged(adapter, shapes, backend, ids))


@pytest.mark.parametrize("name", LEVELS)
def test_levels_and_logits(name: str) -> None:
    fusion = Fusion(random_model(family(name).config()))
    assert fusion.levels == LEVELS[name]
    assert fusion.count == sum(fusion.levels.values())
    assert fusion.error < 1e-5


def test_unfused_attention_leaves_the_rest() -> None:
    """A layer norm on queries and keys is not one of the parts; the MLP is fused all the same."""
    fusion = Fusion(random_model(family("cohere").config()))
    assert fusion.levels == {"MLPs": LAYERS} and fusion.error < 1e-5
    fusion = Fusion(random_model(family("cohere").config(use_qk_norm=False)))
    assert fusion.levels == WHOLE | {"MLPs": LAYERS} and fusion.error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "olmo2", "ernie4_5", "granite", "glm4", "cohere2"])
def test_levels_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """Results differ by rounding there, and some families keep cos and sin in fp32."""
    adapter = DecoderAdapter(random_model(family(name).config()).to(dtype))  # type: ignore[arg-type]  # transformers' stub
    batch = pack([SeqInput(list(range(3, 12)), 0, (0,), 9)], 9, paged.CPU)
    cache = PagedKVCache(adapter.probe(), 1, 9, dtype, paged.CPU)
    context = PagedContext(cache, SdpaAttention().prepare(batch), batch.slots)
    positions = torch.linspace(0, CONTEXT - 1, 9).long()

    def run(given: ForwardContext) -> torch.Tensor:
        return adapter.forward(batch.ids, positions, torch.arange(9), given)

    before = run(context)
    fuse(adapter.model, run, context, lambda *_: None)
    assert fused_levels(adapter.model) == LEVELS[name]
    assert float((run(context) - before).abs().max()) < 0.05 * float(before.abs().max())


# ---- planted differences: right parts, another formula ---------------------------------------------------


def altered(module: Any, forward: Callable[..., object]) -> None:
    """Give one module a forward of its own, which gets the original's and its arguments."""
    base = type(module)

    class Altered(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: object, **kwargs: object) -> object:
            return forward(super().forward, self, *args, **kwargs)

    module.__class__ = Altered


def scaled_attention(original: Callable[..., Any], _: nn.Module, **kwargs: object) -> object:
    out, weights = original(**kwargs)
    return out * 1.001, weights


def far_attention(original: Callable[..., Any], _: nn.Module, **kwargs: Any) -> object:
    """Differs past the first hundred positions only."""
    out, weights = original(**kwargs)
    return out * (1 + 0.01 * (kwargs["position_ids"][0] > 100)[:, None]), weights


def crowd_attention(original: Callable[..., Any], _: nn.Module, **kwargs: Any) -> object:
    """Depends on how many tokens there are, and differs for other numbers than the recorded one."""
    out, weights = original(**kwargs)
    return out * (1.0 if out.shape[1] == 8 else 1.001), weights


def clipped_query(original: Callable[..., Any], module: Any, hidden_states: torch.Tensor, **kwargs: object) -> object:
    """Clips what the recorded pass does not reach."""
    return original(hidden_states=hidden_states.clamp(-12.0, 12.0), **kwargs)


def shifted_mlp(original: Callable[..., Any], _: nn.Module, x: torch.Tensor) -> object:
    return original(x) + 0.01


def clipped_mlp(original: Callable[..., Any], _: nn.Module, x: torch.Tensor) -> object:
    return original(x.clamp(-12.0, 12.0))


def mean_free_norm(original: Callable[..., Any], _: nn.Module, x: torch.Tensor) -> object:
    return original(x - 0.05 * x.mean(-1, keepdim=True))


def leaky_layer(original: Callable[..., Any], _: nn.Module, hidden_states: torch.Tensor, **kwargs: object) -> object:
    """What a dropout that was left on might look like."""
    return original(hidden_states, **kwargs) - 0.01 * hidden_states


def clipped_layer(original: Callable[..., Any], _: nn.Module, hidden_states: torch.Tensor, **kwargs: object) -> object:
    return original(hidden_states.clamp(-20.0, 20.0), **kwargs)


def loud_backbone(original: Callable[..., Any], _: nn.Module, **kwargs: object) -> object:
    out = original(**kwargs)
    out.last_hidden_state = out.last_hidden_state * 1.001
    return out


def whole_but(**levels: int) -> dict[str, int]:
    kept = WHOLE | {"MLPs": LAYERS, "norms": TWO} | levels
    return {level: count for level, count in kept.items() if count}


@pytest.mark.parametrize(
    ("place", "forward", "levels"),
    [
        ("layers.1.self_attn", scaled_attention, whole_but(backbone=0, layers=LAYERS - 1, attention=LAYERS - 1)),
        ("layers.1.self_attn", far_attention, whole_but(backbone=0, layers=LAYERS - 1, attention=LAYERS - 1)),
        ("layers.1.self_attn", crowd_attention, whole_but(backbone=0, layers=LAYERS - 1, attention=LAYERS - 1)),
        ("layers.1.self_attn", clipped_query, whole_but(backbone=0, layers=LAYERS - 1, attention=LAYERS - 1)),
        ("layers.2.mlp", shifted_mlp, whole_but(MLPs=LAYERS - 1)),
        ("layers.2.mlp", clipped_mlp, whole_but(MLPs=LAYERS - 1)),
        ("layers.0.post_attention_layernorm", mean_free_norm, whole_but(norms=TWO - 1)),
        ("norm", mean_free_norm, whole_but(norms=TWO - 1)),
        ("layers.1", leaky_layer, whole_but(backbone=0, layers=LAYERS - 1)),
        ("layers.1", clipped_layer, whole_but(backbone=0, layers=LAYERS - 1)),
        ("", loud_backbone, whole_but(backbone=0)),
    ],
)
def test_planted_difference_is_left_alone(
    place: str, forward: Callable[..., object], levels: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(family("llama").config())
    module = model.get_submodule(f"model.{place}".rstrip("."))
    altered(module, forward)
    with caplog.at_level(logging.INFO):
        fusion = Fusion(model)
    assert model.get_submodule(f"model.{place}".rstrip(".")) is module
    assert fusion.levels == levels and fusion.error < 1e-5
    assert ("not fused: model.layers.1.self_attn" in caplog.text) == ("self_attn" in place)


def company_rope(original: Callable[..., Any], _: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> object:
    """A token's rotation depends on who is fed beside it, as with dynamic scaling past the context."""
    cos, sin = original(x, position_ids)
    factor = 1.0 if int(position_ids.max()) < 100 else 1.001
    return cos * factor, sin * factor


def only_source(model: PreTrainedModel) -> RopeSource:
    backbone = model.get_submodule("model")
    assert isinstance(backbone, FusedBackbone) and len(backbone.sources) == 1
    return backbone.sources[0]


def test_rotary_table_only_where_positions_alone_decide() -> None:
    model = random_model(family("llama").config())
    Fusion(model)
    source = only_source(model)
    assert source.cos is not None and source.cos.shape == (CONTEXT, 16)
    model = random_model(family("llama").config())
    altered(model.get_submodule("model.rotary_emb"), company_rope)
    fusion = Fusion(model)
    source = only_source(model)
    assert source.cos is None and fusion.levels["backbone"] == 1 and fusion.error < 1e-5


def test_rotary_table_of_bounded_size() -> None:
    calls: list[int] = []

    def compute(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(positions.numel())
        angles = positions[..., None] * torch.tensor([1.0, 0.1])
        return angles.cos(), angles.sin()

    source = RopeSource(compute, RopeForm.PAIRS)
    assert not source.tabulate(MAX_TABLE_BYTES // 32 + 1, torch.device("cpu")) and max(calls) < 10
    positions = torch.tensor([[0, 5, 63]])
    computed = source(positions)
    assert source.tabulate(64, torch.device("cpu"))
    calls.clear()
    for one, other in zip(source(positions), computed, strict=True):
        assert one.shape == (3, 4) and torch.equal(one, other)
        torch.testing.assert_close(one[:, 0], one[:, 1], rtol=0, atol=0)  # neighbours turn together
    assert not calls


def test_module_that_someone_listens_to_is_left_alone() -> None:
    """A hook that was there before must not go quiet."""
    model, heard = random_model(family("llama").config()), []
    layers = model.get_submodule("model.layers")
    for part in (layers[0].self_attn.q_proj, layers[1].mlp, layers[2]):  # type: ignore[index]
        part.register_forward_hook(lambda module, *_: heard.append(type(module).__name__))
    fusion = Fusion(model)
    assert fusion.levels == {"layers": 1, "attention": 2, "MLPs": 2, "norms": TWO} and fusion.error < 1e-5
    heard.clear()
    adapter = DecoderAdapter(model)
    adapter.probe()
    assert set(heard) == {"Linear", "LlamaMLP", "LlamaDecoderLayer"}


def test_merged_linears_are_the_linears_side_by_side() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        parts: list[nn.Module] = [nn.Linear(6, size, bias=bias) for size in (4, 2, 3)]
        x = torch.randn(5, 6)
        expected = torch.cat([part(x) for part in parts], dim=-1)
        torch.testing.assert_close(merge_linears(parts)(x), expected, rtol=0, atol=1e-6)
        order = torch.tensor([8, 0, 3])
        torch.testing.assert_close(merge_linears(parts, order)(x), expected[:, order], rtol=0, atol=1e-6)
