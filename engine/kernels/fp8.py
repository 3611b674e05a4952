"""Matrix products in fp8 (e4m3): weights with one scale per output, activations with one per row, sums in fp32.

A row is rounded by itself, so a token's result does not depend on its neighbours in the batch. Scales are the largest
magnitude over 448, the largest number of e4m3, as in Micikevicius et al., "FP8 formats for deep learning" (2022). On
GPUs of compute capability 8.9 and newer the product is cuBLAS's or CUTLASS's own (`torch._scaled_mm`); elsewhere its
twin multiplies the same rounded numbers in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kernels import gpu

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 2.0**-100  # largest magnitudes below this are 0
ALIGNMENT = 16  # of both extents of a weight, for the GPU's product
CAPABILITY = (8, 9)  # least that multiplies in fp8


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """`codes` [outputs, inputs] e4m3, `scales` [outputs] float32: W = codes * scales."""

    codes: torch.Tensor
    scales: torch.Tensor

    def unpack(self) -> torch.Tensor:
        """What it holds, [outputs, inputs] float32."""
        return self.codes.float() * self.scales[:, None]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] -> x W^T [T, outputs] in the dtype of x."""
        codes, scales = round_rows(x)
        if usable(x):
            out_dtype = x.dtype if x.dtype is torch.bfloat16 else torch.bfloat16
            out = torch._scaled_mm(
                codes, self.codes.t(), scale_a=scales[:, None], scale_b=self.scales[None, :], out_dtype=out_dtype
            )
            return out.to(x.dtype)
        product = F.linear(codes.float(), self.codes.float())
        return (product * scales[:, None] * self.scales).to(x.dtype)


def usable(x: torch.Tensor) -> bool:
    """Does this device multiply in fp8?"""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= CAPABILITY


def pack(weight: torch.Tensor) -> Fp8Matrix:
    """Raises ValueError for weights that are not finite, or of extents that the GPU's product can't take."""
    if weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        raise ValueError(f"a weight of {tuple(weight.shape)} is no multiple of {ALIGNMENT} both ways")
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight is not finite")
    return Fp8Matrix(*round_reference(weight))


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, n] -> codes [T, n] e4m3 and scales [T] float32. A row with a NaN or an infinity has scale NaN."""
    if gpu.fits(x):
        return gpu.kernels().round_fp8(x)
    return round_reference(x)


def round_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of the kernel."""
    wide = x.float()
    largest = wide.abs().amax(1)
    sound = largest.isfinite()
    empty = ~sound | (largest < SMALLEST)
    scales = torch.where(empty, 1.0, largest / LARGEST)
    codes = torch.where(empty[:, None], 0.0, wide / scales[:, None]).clamp_(-LARGEST, LARGEST).to(E4M3)
    return codes, torch.where(sound, scales, torch.nan)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What `round_rows` leaves of x [T, n], in its dtype."""
    codes, scales = round_reference(x)
    return (codes.float() * scales[:, None]).to(x.dtype)
