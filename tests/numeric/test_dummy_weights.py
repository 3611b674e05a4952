"""`load_format: dummy`: a model from its configuration alone, sane and repeatable, at once in its final type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine.config import ModelConfig
from engine.runtime.loading import load_checked
from engine.runtime.weights import dummy_model, load_config, load_model
from tests.tiny import FAMILIES, tiny_config

CPU = torch.device("cpu")
PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "models"


def config_of(family: str, folder: Path) -> PretrainedConfig:
    tiny_config(family).save_pretrained(folder)
    return load_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_made_and_sane(family: str, tmp_path: Path) -> None:
    torch.empty(1 << 22).fill_(float("nan"))  # so that memory nobody wrote to is likely to show
    config = config_of(family, tmp_path)
    model = load_model(tmp_path, config, torch.bfloat16, CPU, "dummy")
    fresh = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16 and not parameter.requires_grad and bool(parameter.isfinite().all())
        if parameter.dim() > 1:
            assert 0.5 < float(parameter.float().std()) / config.get_text_config().initializer_range < 1.5, name
        else:  # norms and biases as the family makes them
            assert torch.equal(parameter.float(), fresh[name].float()), name
    assert model.config.tie_word_embeddings == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    assert bool(model(torch.arange(20)[None]).logits.isfinite().all())


def test_a_parameter_depends_on_its_name_alone(tmp_path: Path) -> None:
    config = config_of("llama", tmp_path)
    torch.manual_seed(1)
    whole = dict(dummy_model(config, torch.float32, CPU).named_parameters())
    config.num_hidden_layers = 2
    torch.manual_seed(2)
    small = dict(dummy_model(config, torch.float32, CPU).named_parameters())
    assert set(small) < set(whole) and all(torch.equal(small[name], whole[name]) for name in small)
    q, k = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(whole[q], whole[k])


@pytest.mark.parametrize("quant", ["none", "fp16"])
def test_a_dummy_passes_the_checks_of_a_real_model(
    quant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_of("qwen3", tmp_path)
    assert [file.name for file in tmp_path.iterdir() if "safetensors" in file.name] == []
    loaded = load_checked(ModelConfig(str(tmp_path), quant=quant, device="cpu", load_format="dummy"), tmp_path, print)
    assert len(loaded.shapes) == 4 and "random weights" in caplog.text


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [("qwen3-8b", 8_190_735_360, 144 << 10), ("llama-3.1-8b", 8_030_261_248, 128 << 10)],
)
def test_published_shapes(name: str, parameters: int, kv_bytes: int) -> None:
    """Parameters of the published checkpoints, and bytes of one token's keys and values in 16 bits."""
    config = load_config(PUBLISHED / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    width = config.num_key_value_heads * config.head_dim
    assert 2 * config.num_hidden_layers * width * 2 == kv_bytes
