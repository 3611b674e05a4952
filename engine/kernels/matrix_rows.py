"""Single rows of a packed matrix as floats: what an embedding look-up in a tied output head reads."""

from __future__ import annotations

import torch

from engine.kernels.native_matrix import PANEL
from engine.kernels.reference_matrix import Packed


def rows(matrix: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [n] int64 of W as its codes say: [n, inputs] float32, those of `unpack` bit for bit."""
    tensors, panels = matrix.tensors(), -(-matrix.outputs // PANEL)
    panel, lane = ids // PANEL, ids % PANEL
    codes = tensors["codes"]
    if matrix.format == "fp16":
        return codes.view(panels, matrix.inputs, PANEL)[panel, :, lane].float()
    groups = -(-matrix.inputs // matrix.group)
    quads = codes.view(panels, groups, -1, PANEL, 4)[panel, :, :, lane]  # [n, groups, quads or pairs of them, 4]

    def of_groups(name: str) -> torch.Tensor:
        found = tensors[name].view(panels, groups, PANEL)[panel, :, lane].float() * tensors["multiplier"]
        return found.unsqueeze(-1)

    if matrix.format == "int8":
        weight = (quads.flatten(2).float() - 128) * of_groups("scales")
    else:
        both = torch.stack((quads & 15, quads >> 4), dim=3).flatten(2).float()
        weight = both * of_groups("scales") + of_groups("minima")
    return weight.flatten(1)[:, : matrix.inputs]
