"""Linear layers with fp8 weights and activations, for GPUs that multiply such numbers."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.fp8 import Fp8Matrix, pack


class Fp8Linear(nn.Module):
    """y = x W^T + b with W rounded to e4m3 by output, x by row. x [..., in] -> [..., out]. Inference only.

    Raises ValueError for weights that fp8 products can't take.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        matrix = pack(weight.detach())
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._matrix = matrix

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] float32 as rounded, unpacked at every read."""
        return self._matrix.unpack()

    @property
    def matrix(self) -> Fp8Matrix:
        return self._matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._matrix.multiply(x.reshape(-1, self.in_features))
        bias = self._buffers["bias"]
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], self.out_features)
