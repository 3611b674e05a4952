"""Gated feed-forward networks with one product for gate and up."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels import ops
from engine.models.fused.parts import FusedPart


class FusedMLP(FusedPart):
    """down(act(gate x) * up x). Same call and result as the module it replaces.

    `kind` names an activation of `ops.gated_activation`; "" means the module `activation`.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module, kind: str, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down
        self.kind = kind
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> the same shape."""
        return self.run(x.reshape(-1, x.shape[-1])).view(x.shape)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, width] -> [T, width], without the module call."""
        parts = self._modules
        gate_up = parts["gate_up"](x)  # type: ignore[misc]  # never None
        if self.kind:
            return parts["down_proj"](ops.gated_activation(gate_up, self.kind))  # type: ignore[misc]
        gate, up = gate_up.chunk(2, dim=-1)
        return parts["down_proj"](parts["act_fn"](gate) * up)  # type: ignore[misc]
