"""Hidden states of the target for a given text, computed when they are needed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.models.context import Taps
from engine.models.taps import tapped


class TargetStates:
    """The target by `transformers`, and what it thinks after some of its layers."""

    def __init__(self, folder: Path, taps: tuple[int, ...], device: torch.device) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.eval()
        self._model.to(device)
        self._taps = taps

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [T] int64 -> [T, taps * width] float16 on the CPU, in the order of the taps."""
        taps = Taps(self._taps)
        ids = tokens.to(self._model.device).unsqueeze(0)
        with tapped(self._model, taps):
            self._model.base_model(input_ids=ids, use_cache=False)
        limit = torch.finfo(torch.float16).max
        return torch.cat([taps.states[tap] for tap in self._taps], dim=1).float().clamp(-limit, limit).half().cpu()
