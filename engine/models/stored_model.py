"""A causal language model all of whose parts are fused, without the class of `transformers` around it.

What is left of that class is a head and what happens to its logits. Such a model can be kept in a file and built again
without `transformers`, whose import takes longer than everything else in a start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Self

import torch
from torch import nn

from engine.models.fused.backbone import FusedBackbone


class StoredConfig(SimpleNamespace):
    """A configuration's values as attributes, as `PretrainedConfig` has them; `text` is the decoder's part."""

    @classmethod
    def of(cls, values: Mapping[str, object], text: Mapping[str, object]) -> Self:
        """From the JSON of a configuration and of its decoder's part, which may be the same."""
        made = cls(**values)
        made.text = cls(**text)
        return made

    def get_text_config(self) -> StoredConfig:
        text: StoredConfig = getattr(self, "text", self)
        return text


def config_values(config: object) -> dict[str, object]:
    """A configuration of `transformers`, or ours, as JSON holds it."""
    if isinstance(config, StoredConfig):
        return {key: value for key, value in vars(config).items() if key != "text"}
    values: dict[str, object] = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    return values | {"model_type": config.model_type}  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """What the backbone returns: [1, T, width]."""

    last_hidden_state: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What the model returns: [1, rows, vocabulary]."""

    logits: torch.Tensor


class StoredModel(nn.Module):
    """Token ids to logits: softcap * tanh(scale * head(backbone(ids)) / softcap), or without the cap."""

    def __init__(
        self, config: StoredConfig, backbone: FusedBackbone, head: nn.Module, scale: float, softcap: float | None
    ) -> None:
        super().__init__()
        backbone.output_type = Hidden
        self.config = config
        self.model = backbone
        self.lm_head = head
        self.logits_scale = scale
        self.logits_softcap = softcap
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @property
    def base_model(self) -> FusedBackbone:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule(self.model.embedding)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False, **rest: object
    ) -> Scored:
        """input_ids, position_ids [1, T]; the rest goes to the backbone."""
        assert not use_cache
        out = self.model(input_ids, position_ids=position_ids, **rest)
        logits = self.lm_head(out.last_hidden_state)
        return Scored(finish_logits(logits, self.logits_scale, self.logits_softcap))


def finish_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """From what the head says to the model's logits, of the same shape."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
