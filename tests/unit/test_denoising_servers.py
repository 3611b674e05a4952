"""What a server's `models.diffusion` comes to over a checkpoint, and what the front process knows of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.config import DiffusionConfig, EngineConfig, ModelConfig
from engine.core import model_info
from engine.denoising import settle_server
from engine.diffusion import DiffusionInfo, DiffusionParams, DiffusionSpec
from engine.errors import ConfigError
from engine.types import Capacity, DecodeTraits
from tests.denoisers import BLOCK_INFO, DUAL_INFO, FULL_INFO, LLADA, RULES, SDAR, STOP
from tests.unit.test_denoising import PLAIN, ask, fit, refusal, settled


def capacity(spec: DiffusionSpec | None = LLADA, **fields: Any) -> Capacity:
    full = spec is not None and not spec.block_causal
    unit = 1 if spec is None or full else spec.block_length
    traits = DecodeTraits(denoises=spec is not None, canvas=full, unit=unit)
    fields = {"traits": traits, "diffusion": spec, "rules": RULES, "max_canvas": 48 if full else 0, **fields}
    return Capacity(num_blocks=32, block_size=4, max_model_len=64, vocab_size=100, **fields)


def offered(config: DiffusionConfig | None, found: Capacity, pipeline: str = "masked_diffusion") -> DiffusionInfo:
    info = settle_server(ModelConfig("/models/m", pipeline=pipeline, diffusion=config), found)
    assert info is not None
    return info


def test_a_server_without_settings_takes_the_checkpoints() -> None:
    assert offered(None, capacity()) == replace(FULL_INFO, defaults=replace(FULL_INFO.defaults, canvas=47))
    assert offered(DiffusionConfig(canvas=40), capacity(), "autoregressive") == FULL_INFO
    assert offered(None, capacity(SDAR)) == BLOCK_INFO
    assert offered(DiffusionConfig(canvas=40), capacity(), "dual_diffusion") == DUAL_INFO


def test_a_server_with_settings() -> None:
    config = DiffusionConfig("frechet", {"delta": 0}, "dual", 16, 32, 8, "org/Fast-7B/", 4, "both", 0.5)
    own = offered(config, capacity(), "dual_diffusion")
    defaults = DiffusionParams("frechet", (("delta", 0.0),), "dual", 16, 32, 8, 4, "both", 0.5)
    assert (own.defaults, own.drafter) == (defaults, "Fast-7B")
    # A drafter with blocks of its own: no other length, and steps may reach past the canvas.
    traits = DecodeTraits(denoises=True, canvas=True, unit=16)
    own = offered(config, capacity(traits=traits), "dual_diffusion")
    assert (own.block_lengths, own.surplus, own.defaults.block_length) == ((16, 16), 15, 16)
    info = replace(PLAIN, diffusion=own)
    assert fit(ask(), info, tokens=29).diffusion.canvas == 29
    assert refusal(ask(), info, tokens=30).param == "max_tokens"


def test_steps_of_the_server_are_of_its_canvas() -> None:
    own = offered(DiffusionConfig("quota", canvas=32, steps=8), capacity())
    info = replace(PLAIN, diffusion=own)
    found = [settled(ask(), info, tokens=tokens).steps for tokens in (1, 8, 16, 32, 40)]
    assert found == [2, 2, 4, 8, 10]  # canvases of 8, 8, 16, 32 and 40
    assert settled(ask(steps=3), info).steps == 3
    assert settled(ask("threshold"), info).steps == 0


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (
            DiffusionConfig("fastest"),
            capacity(),
            "rule: 'fastest' is not offered by this model; it has quota, threshold",
        ),
        (DiffusionConfig(knobs={"delta": 0.1}), capacity(), "knobs.delta: unknown to threshold, which has threshold"),
        (DiffusionConfig("frechet", {"delta": 9}), capacity(), "knobs.delta: must be a number between -8 and 8, got 9"),
        (
            DiffusionConfig(cache="block"),
            capacity(),
            "cache: 'block' is not offered by this model; it has none, prefix",
        ),
        (DiffusionConfig(cache="prefix"), capacity(SDAR), "cache: 'prefix' is not offered by this model; it has block"),
        (
            DiffusionConfig(block_length=8),
            capacity(SDAR),
            "block_length: 8, but this model has 4, as it was trained for",
        ),
        (
            DiffusionConfig(canvas=40, verify="masked_copy"),
            capacity(replace(LLADA, shift=True)),
            "verify: 'masked_copy' is not offered by this model; it has trust, exact, confidence, both",
        ),
        (DiffusionConfig(), capacity(), "canvas: 256 tokens and a prompt do not fit into one step of 48; raise"),
        (DiffusionConfig(canvas=48), capacity(), "canvas: 48 tokens and a prompt do not fit into one step of 48"),
    ],
)
def test_settings_that_the_checkpoint_cannot_have_name_the_key(
    config: DiffusionConfig, found: Capacity, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        offered(config, found, "dual_diffusion" if config.drafts else "masked_diffusion")
    assert str(refused.value).startswith(f"models.diffusion.{message}")


def test_settings_are_for_models_that_denoise() -> None:
    with pytest.raises(ConfigError, match=r"models\.diffusion: m is no diffusion model"):
        settle_server(ModelConfig("/models/m", diffusion=DiffusionConfig()), capacity(None))
    assert settle_server(ModelConfig("/models/m"), capacity(None)) is None


def test_what_the_front_process_knows() -> None:
    """The pipeline is what runs; an answer ends at the checkpoint's own stops too."""
    info = model_info(EngineConfig(ModelConfig("/models/m")), capacity(), (99,), 0)
    assert (info.pipeline, info.eos_ids, info.max_draft) == ("masked_diffusion", (99, STOP), 0)
    assert info.diffusion == offered(None, capacity())
    info = model_info(EngineConfig(ModelConfig("/models/m")), capacity(None), (99, 98, 99), 0)
    assert (info.pipeline, info.eos_ids, info.diffusion) == ("autoregressive", (99, 98), None)
