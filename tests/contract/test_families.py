"""Every supported family: paged, packed, chunked and block runs equal the model's own plain forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from engine.attention.sdpa import SdpaAttention, SdpaStep
from engine.config import EngineConfig, KVConfig, ModelConfig
from engine.errors import ModelLoadError
from engine.models import selfcheck
from engine.models.adapter import DecoderAdapter, check_supported, context_length
from engine.runtime.batch import DeviceBatch
from engine.runtime.weights import load_config, load_model
from engine.runtime.worker import LocalWorker
from engine.types import Phase
from tests.tiny import FAMILIES, save_tiny, tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def test_paged_equals_plain(folder: Path) -> None:
    model = load_model(folder, load_config(folder), torch.float32, torch.device("cpu"))
    expected = selfcheck.plain_logits(model, model.config.vocab_size)
    adapter = DecoderAdapter(model)
    got = selfcheck.paged_logits(adapter, adapter.probe(), SdpaAttention(), torch.float32)
    for want, have in zip(expected, got, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", ["none", "fp16"])
def test_worker_starts_with_fused_layers(folder: Path, quant: str) -> None:
    phases: list[Phase] = []
    config = EngineConfig(model=ModelConfig(path="x", quant=quant), kv=KVConfig(memory="8MiB"))
    worker = LocalWorker(config, folder, phases.append)
    assert worker.capacity().max_model_len == 512
    detail = next(phase.detail for phase in phases if phase.name == "fusion and packing")
    family = load_config(folder).model_type
    # phi3 and gpt2 come with merged projections of their own; every other family fuses both halves of each layer.
    assert detail.startswith("0 " if family in ("phi3", "gpt2") else "8 ")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_self_check_refuses_a_wrong_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that loses the last key of every sequence must not get through."""
    model = tiny_model(family)
    expected = selfcheck.plain_logits(model, model.config.vocab_size)
    adapter = DecoderAdapter(model)
    prepare = SdpaAttention.prepare

    def forgetful(self: SdpaAttention, batch: DeviceBatch) -> SdpaStep:
        short = tuple(max(length - 1, 1) for length in batch.kv_lens_host)
        return prepare(self, replace(batch, kv_lens=torch.tensor(short, dtype=torch.int32), kv_lens_host=short))

    monkeypatch.setattr(SdpaAttention, "prepare", forgetful)
    got = selfcheck.paged_logits(adapter, adapter.probe(), SdpaAttention(), torch.float32)
    with pytest.raises(ModelLoadError, match="would give wrong text"):
        selfcheck.check(expected, got, selfcheck.TOLERANCE["fp16"], family)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv"),
    ],
)
def test_hybrids_and_encoders_are_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        check_supported(config)


def test_recurrent_model_is_refused() -> None:
    """No layer_types to read: the probe sees that no attention was called."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ModelLoadError):
        DecoderAdapter(AutoModelForCausalLM.from_config(config)).probe()


def test_longrope_is_served_within_its_original_context() -> None:
    """Past it, the factors of all requests in a pass would change with the longest of them."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=256,
        pad_token_id=0,
        rope_parameters={**factors, "rope_theta": 1e4, "original_max_position_embeddings": 256},
    )
    assert context_length(config) == 256
    assert context_length(LlamaConfig(max_position_embeddings=4096)) == 4096
