"""What training needs of the target: its embedding table, its head, its last norm and a few of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig

from engine.errors import ConfigError


def last_layer(folder: Path) -> int:
    """Index of the target's last layer, whose output gives its own logits."""
    return int(AutoConfig.from_pretrained(folder).num_hidden_layers) - 1


@dataclass(frozen=True, slots=True, eq=False)
class TargetParts:
    """Tensors of a Llama-shaped checkpoint, float32. `head` is the embedding table where the two are tied."""

    config: PretrainedConfig
    embedding: torch.Tensor  # [vocabulary, width]
    head: torch.Tensor  # [vocabulary, width]
    norm: torch.Tensor  # [width]
    layers: dict[int, dict[str, torch.Tensor]]

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """The last layer's output [.., width] as the head takes it."""
        norm = self.norm.to(states.device)
        return functional.rms_norm(states.float(), (states.shape[-1],), norm, self.config.rms_norm_eps)


def load(folder: Path, layers: tuple[int, ...] = ()) -> TargetParts:
    """Read the parts of a checkpoint, and the given layers' tensors by their names inside a layer."""
    config = AutoConfig.from_pretrained(folder)
    found: dict[str, torch.Tensor] = {}
    wanted = ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"model.layers.{i}." for i in layers))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                if name.startswith(wanted):
                    found[name] = file.get_tensor(name).float()
    missing = {"model.embed_tokens.weight", "model.norm.weight"} - set(found)
    if missing:
        raise ConfigError(f"{folder} has no {min(missing)}: drafts are trained for targets shaped like Llama")
    embedding = found["model.embed_tokens.weight"]
    parts = {
        i: {name.removeprefix(f"model.layers.{i}."): t for name, t in found.items() if f"model.layers.{i}." in name}
        for i in layers
    }
    return TargetParts(config, embedding, found.get("lm_head.weight", embedding), found["model.norm.weight"], parts)
