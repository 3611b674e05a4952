"""CPU linear layers with packed weights and fp32 activations: our own kernels in three formats, or fbgemm's fp16.

fp16 rounds the weights alone. int8 and int4 also round each row of the input, group by group; a row's result never
depends on its neighbours. Where there is no native library, fbgemm's fp16 serves for all three.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

from engine.kernels.library import library
from engine.kernels.matrix import PackedMatrix, pack
from engine.runtime.fp8_linear import Fp8Linear

logger = logging.getLogger(__name__)


def packing_available() -> bool:
    """Whether linear layers can be packed at all on this machine (x86 only)."""
    return library() is not None or "fbgemm" in torch.backends.quantized.supported_engines


class NativeLinear(nn.Module):
    """y = x W^T + b with W as it is packed. x: [..., in] float32 -> [..., out] float32. Inference only."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.outputs, matrix.inputs

    @property
    def packed_bytes(self) -> int:
        return self.matrix.nbytes

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] float32 as rounded, unpacked at every read: some routers multiply by hand."""
        return self.matrix.unpack()

    @property
    def bias(self) -> torch.Tensor | None:
        return self.matrix.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.matrix.format}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:
            return self.matrix.multiply(x)
        return self.matrix.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class PackedLinear(nn.Module):
    """y = x W^T + b with W rounded to fp16, by fbgemm. x: [..., in] float32 -> [..., out] float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # The default engine refuses fp16 packing, and the operator looks at this setting at every call.
        torch.backends.quantized.engine = "fbgemm"
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        largest = torch.finfo(torch.float16).max
        low, high = torch.aminmax(weight)  # abs() would copy the whole weight
        if not -largest <= float(low) <= float(high) <= largest:
            raise ValueError(f"a weight is larger than fp16 can hold ({largest:g})")
        # Past the dispatch in Python, which looks for fake script objects at every call: 5 us, 120 times a step.
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default._op
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float().contiguous(), None if bias is None else bias.detach().float().contiguous()
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


PackedLayer = NativeLinear | PackedLinear | Fp8Linear


def pack_weight(weight: torch.Tensor, bias: torch.Tensor | None, format: str = "fp16") -> PackedLayer:
    """W [out, in] in one of `native_matrix.FORMATS`, in fbgemm's fp16 where our kernels don't run, or in fp8.

    Raises ValueError for weights that are too large for fp16, or not finite.
    """
    if format == "fp8":
        return Fp8Linear(weight, bias)
    if library() is None:
        _tell_fallback(format)
        return PackedLinear(weight, bias)
    return NativeLinear(pack(weight, format, bias))


def pack_linear(layer: nn.Linear, format: str = "fp16") -> nn.Module:
    """A packed copy of a linear layer, or the layer itself where fp16 can't hold its weights."""
    try:
        return pack_weight(layer.weight, layer.bias, format)
    except ValueError:
        return layer


@cache
def _tell_fallback(format: str) -> None:
    """Once per format."""
    logger.warning("no native kernels: linear layers are packed to fp16 by fbgemm instead of %s", format)
