"""Checkpoints whose network is in `transformers`, but under another model type, other tensor names, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from engine.models.families.experts import llada_moe_config, sdar_moe_config
from engine.models.families.llada import NAMES, llada_config
from engine.models.families.renamed import llama_config, qwen2_config, qwen3_config, without_windows


@dataclass(frozen=True, slots=True)
class Family:
    """`config` makes a configuration of `transformers` of config.json; `names` are patterns for the tensors' names."""

    config: Callable[[Mapping[str, object]], PretrainedConfig]
    names: Mapping[str, str] = field(default_factory=dict)


# model_type in config.json, in lower case -> family. What each was trained for is in hub/diffusion.py.
FAMILIES = {
    "llada": Family(llada_config, NAMES),
    "dream": Family(qwen2_config),
    "fast_dllm_qwen": Family(qwen2_config),
    "sdar": Family(qwen3_config),
    "sdar_moe": Family(sdar_moe_config),
    "lladamoe": Family(llada_moe_config),
    "llada_moe": Family(llada_moe_config),
    "a2d-llama": Family(llama_config),
    "a2d-qwen2": Family(without_windows(qwen2_config)),
    "a2d-qwen3": Family(without_windows(qwen3_config)),
}


# What a model_type that several networks share leaves open.
_BY_ARCHITECTURE = {"lladamoemodellm": "llada_moe", "lladamoemodel": "llada_moe", "sdarmoeforcausallm": "sdar_moe"}


def find_family(raw: Mapping[str, object]) -> Family | None:
    """The family of a config.json; None for one that `transformers` knows itself, or nobody does."""
    listed = raw.get("architectures")
    names = [str(name).lower() for name in listed] if isinstance(listed, list) else []
    shared = next((_BY_ARCHITECTURE[name] for name in names if name in _BY_ARCHITECTURE), None)
    return FAMILIES.get(shared or str(raw.get("model_type", "")).lower())
