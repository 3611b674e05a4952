"""Masked-diffusion checkpoints that can't be served, refused by name; and a network that is not what it looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from engine.config import DiffusionConfig, ModelConfig
from engine.errors import ModelLoadError
from engine.models import selfcheck
from engine.runtime.batch import DeviceBatch, SeqInput, pack
from engine.runtime.loading import LoadedModel, load_checked
from tests.tiny_diffusion import save_tiny_diffusion


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, diffusion: DiffusionConfig | None = None) -> LoadedModel:
    config = ModelConfig(str(folder), quant="none", device="cpu", diffusion=diffusion)
    return load_checked(config, folder, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llada", {"alibi": True}, "alibi: True"),
        ("llada", {"clip_qkv": 8.0}, r"clip_qkv: 8\.0"),
        ("llada", {"scale_logits": True}, "scale_logits: True"),
        ("llada", {"include_bias": True}, "include_bias: True"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias: True"),
        ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm: True"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm: True"),
        ("llada", {"input_emb_norm": True}, "input_emb_norm: True"),
        ("llada", {"rope": False}, "rope: False"),
        ("llada", {"rope": None}, "rope: None"),
        ("llada", {"layer_norm_type": "low_precision"}, "layer_norm_type: 'low_precision'"),
        ("llada", {"block_type": "sequential"}, "block_type: 'sequential'"),
        ("llada", {"block_group_size": 2}, "block_group_size: 2"),
        ("llada", {"activation_type": "swiglu"}, "activation_type: 'swiglu'"),
        ("llada", {"n_layers": None}, "n_layers must be a whole number above 0, not None"),
        ("llada", {"d_model": "32"}, "d_model must be a whole number above 0, not '32'"),
        ("llada", {"n_heads": 0}, "n_heads must be a whole number above 0, not 0"),
        ("dream", {"use_mrope": True}, "Dream: config.json has use_mrope: true"),
        ("dream", {"use_sliding_window": True}, "Dream: config.json has use_sliding_window: true"),
        ("fast_dllm_v2", {"use_sliding_window": True}, "Fast_dLLM_Qwen: config.json has use_sliding_window: true"),
        ("sdar", {"use_sliding_window": True}, "sdar: config.json has use_sliding_window: true"),
        ("sdar", {"model_type": "llada2_moe"}, "expert layers of a form of its own"),
        ("llada_moe", {"shared_expert_intermediate_size": 20}, "shared_expert_intermediate_size: 20"),
        ("llada_moe", {"qk_layernorm": False}, "qk_layernorm: False"),
        ("llada_moe", {"clip_qkv": 8.0}, r"clip_qkv: 8\.0"),
        ("llada_moe", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0\.5"),
        ("llada_moe", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias: True"),
        ("llada_moe", {"moe_layer_freq": None}, "lacks hidden_size, num_attention_heads or moe_layer_freq"),
        ("sdar", {"mask_token_id": 300}, "mask token has the id 300"),
        ("dream", {"hidden_size": "wide"}, "no usable config.json"),
    ],
)
def test_what_a_plain_network_can_not_do(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load(save_tiny_diffusion(kind, tmp_path, **changes))


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [
        ("llada", "model.transformer.blocks.1.attn_out.bias", "unexpected keys"),
        ("dream", "model.layers.0.self_attn.o_proj.bias", "unexpected keys"),
        ("sdar", "model.layers.0.mlp.experts.0.up_proj.weight", "unexpected keys"),
        ("llada", "-model.transformer.ff_out.weight", "missing keys"),
        ("llada", "-model.transformer.blocks.0.ff_out.weight", "missing keys"),
        ("sdar_moe", "-model.layers.1.mlp.experts.3.up_proj.weight", "the weights"),
        ("sdar", "-model.layers.1.self_attn.k_norm.weight", "missing keys"),
    ],
)
def test_tensors_that_are_left_over_or_lacking(tmp_path: Path, kind: str, name: str, problem: str) -> None:
    folder = save_tiny_diffusion(kind, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if name.startswith("-"):
        del tensors[name.removeprefix("-")]
    else:
        tensors[name] = torch.zeros(32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=problem):
        load(folder)


def test_a_window_of_dllms_conversions_means_nothing(tmp_path: Path) -> None:
    """Their code gives such layers the mask of all others; so does this one."""
    folder = save_tiny_diffusion("a2d_qwen3_full", tmp_path, use_sliding_window=True, sliding_window=4)
    assert load(folder).diffusion is not None


@pytest.mark.parametrize("kind", ["llada", "a2d_llama_block", "stable_diffcoder"])
def test_a_network_that_is_causal_in_a_hidden_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It takes the mask that it is given and hides what comes later all the same."""
    masks: Callable[..., torch.Tensor | None] = vars(modeling_llama)["create_causal_mask"]

    def hiding(*given: Any, **named: Any) -> torch.Tensor | None:
        mask = masks(*given, **named)
        if mask is None:  # in the served pass, which hides by itself
            return None
        length = mask.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        return mask.masked_fill(later, torch.finfo(mask.dtype).min)

    folder = save_tiny_diffusion(kind, tmp_path)
    load(folder)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", hiding)
    with pytest.raises(ModelLoadError, match=r"differs from the model's own by"):
        load(folder)


@pytest.mark.parametrize("kind", ["llada", "sdar"])
def test_a_backend_that_hides_later_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The other way round: the served pass is causal, and the model is not."""

    def causal(inputs: Sequence[SeqInput], size: int, device: torch.device, *_: object) -> DeviceBatch:
        return pack(inputs, size, device)

    monkeypatch.setattr(selfcheck, "pack", causal)
    with pytest.raises(ModelLoadError, match=r"differs from the model's own by"):
        load(save_tiny_diffusion(kind, tmp_path))


def test_a_block_length_that_is_not_the_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"diffusion\.block_length.*blocks of 4 tokens, not 8"):
        load(save_tiny_diffusion("sdar", tmp_path), DiffusionConfig(block_length=8))
