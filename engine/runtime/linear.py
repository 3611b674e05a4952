"""CPU linear layers with fp16-packed weights and fp32 activations and accumulation (fbgemm).

On AVX2 machines this is 2 to 3 times faster than fp32 at every batch size, halves the memory, and is the only 16-bit
path that is not slower than fp32. The weights are rounded to fp16; nothing else changes.
"""

from __future__ import annotations

import torch
from torch import nn


def packing_available() -> bool:
    """Whether this build of torch has the fbgemm kernels (x86 only)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """y = x W^T + b with W rounded to fp16. x: [..., in] float32 -> [..., out] float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # The default engine refuses fp16 packing, and the operator looks at this setting at every call.
        torch.backends.quantized.engine = "fbgemm"
        self.out_features, self.in_features = weight.shape
        largest = torch.finfo(torch.float16).max
        low, high = torch.aminmax(weight)  # abs() would copy the whole weight
        if max(-float(low), float(high)) > largest:
            raise ValueError(f"a weight is larger than fp16 can hold ({largest:g})")
        # Past the dispatch in Python, which looks for fake script objects at every call: 5 us, 120 times a step.
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default._op
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight.detach().float().contiguous(), None if bias is None else bias.detach().float().contiguous()
        )

    @property
    def packed_bytes(self) -> int:
        """About what the packed weights take."""
        return 2 * self.in_features * self.out_features

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] float32 as rounded, unpacked at every read: some routers multiply by hand."""
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self.packed)


def pack_linear(layer: nn.Linear) -> nn.Module:
    """A packed copy of a linear layer, or the layer itself where fp16 can't hold its weights."""
    try:
        return PackedLinear(layer.weight, layer.bias)
    except ValueError:
        return layer
