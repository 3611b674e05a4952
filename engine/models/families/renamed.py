"""Families that are a network of `transformers` under a model type of their own, tensor names and all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from engine.errors import ModelLoadError

# Of the checkpoint's own code and class, which is not run.
_OWN = ("model_type", "architectures", "auto_map", "transformers_version")


def llama_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """a2d-llama."""
    return LlamaConfig.from_dict(_without(raw))


def qwen2_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """Dream, DiffuCoder, Fast-dLLM v2. Raises ModelLoadError for what their networks do and a Qwen2 does not."""
    if raw.get("use_mrope"):
        raise ModelLoadError(f"{raw.get('model_type')}: config.json has use_mrope: true, which can't be served")
    return Qwen2Config.from_dict(plain_attention(raw))


def qwen3_config(raw: Mapping[str, object]) -> PretrainedConfig:
    """SDAR."""
    return Qwen3Config.from_dict(plain_attention(raw))


def without_windows(build: Callable[[Mapping[str, object]], PretrainedConfig]) -> Callable[..., PretrainedConfig]:
    """For dllm's conversions, whose code gives layers with a window the same mask as all others."""
    return lambda raw: build({**raw, "use_sliding_window": False, "layer_types": None})


def plain_attention(raw: Mapping[str, object]) -> dict[str, object]:
    """Without windows: those of a causal model mean nothing where tokens see later ones."""
    if raw.get("use_sliding_window"):
        raise ModelLoadError(
            f"{raw.get('model_type')}: config.json has use_sliding_window: true, which can't be served: a window on "
            "attention that is not causal"
        )
    return {**_without(raw), "use_sliding_window": False, "sliding_window": None, "layer_types": None}


def _without(raw: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in raw.items() if key not in _OWN}
