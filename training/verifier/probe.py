"""The head while it is trained: a linear probe over standardised hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Probe(nn.Module):
    """weight = sigmoid(a . standardised [draft ; target] + b_place). See `engine.models.verifier_head` for its use.

    Also a `protocols.VerifierHead`: roll-outs run at the weights of the moment. They are `start` everywhere at first.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, draft_width: int, target_width: int, places: int, start: float = 0.7) -> None:
        super().__init__()
        self.draft_width = draft_width
        self.direction = nn.Parameter(torch.zeros(draft_width + target_width))
        self.bias = nn.Parameter(torch.full((places,), math.log(start / (1 - start))))
        self.register_buffer("mean", torch.zeros(draft_width + target_width))
        self.register_buffer("scale", torch.zeros(draft_width + target_width))  # 0: not standardised yet

    @property
    def fitted(self) -> bool:
        return bool(self.scale.any())

    @torch.no_grad()
    def fit(self, hidden: Tensor, states: Tensor) -> None:
        """Take mean and scale of the inputs from some of them; without a direction yet, that changes no weight."""
        inputs = torch.cat((hidden, states), dim=-1).float().flatten(0, -2)
        self.mean.copy_(inputs.mean(0))
        deviation = inputs.std(0, correction=0)
        self.scale.copy_(deviation.clamp(min=1e-3 * float(deviation.mean()) + 1e-12).reciprocal())

    def forward(self, hidden: Tensor, states: Tensor, place: Tensor) -> Tensor:
        """Weights [...] float32 of inputs [..., width] at these places [...]."""
        inputs = (torch.cat((hidden, states), dim=-1).float() - self.mean) * self.scale
        return (inputs @ self.direction + self.bias[place.clamp(max=len(self.bias) - 1)]).sigmoid()

    @torch.inference_mode()
    def weights(self, hidden: Tensor, states: Tensor) -> Tensor:
        """hidden [n, k, draft width] and states [n, k, target width] -> [n, k] float32."""
        place = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        weights: Tensor = self(hidden, states, place)
        return weights

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The tensors of a head over plain inputs, as `verifier_head.save_head` takes them."""
        direction = self.direction.double() * self.scale.double()
        bias = self.bias.double() - direction @ self.mean.double()
        parts = {"draft.weight": direction[: self.draft_width], "target.weight": direction[self.draft_width :]}
        return {name: part.float() for name, part in {**parts, "bias": bias}.items()}
