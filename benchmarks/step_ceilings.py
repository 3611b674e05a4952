"""What the machine allows: memory bandwidth and matrix rate, measured with the library that the engine uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.kernels.native_matrix import FORMATS
from engine.runtime.devices import Placement
from engine.runtime.linear import pack_weight

# Bytes of one tensor that memory is measured with, several times any cache.
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
# Rows, inner size and columns of the product that the matrix rate is measured with.
_PRODUCT = {"cpu": (256, 2048, 2048), "cuda": (8192, 8192, 8192)}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several runs each: what disturbs a run only makes it slower."""

    bytes_per_second: float
    flops_per_second: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )


def measure_ceilings(placement: Placement, turns: int) -> Ceilings:
    """Bandwidth: the better of a copy (bytes read and written) and a product with one row (bytes read).

    Matrix rate: a product of random matrices in the model's type, or with packed weights where the model has them.
    """
    return Ceilings(_bandwidth(placement, turns), _matrix_rate(placement, turns))


def _bandwidth(placement: Placement, turns: int) -> float:
    device, dtype = placement.device, placement.dtype
    source = torch.randn(_BYTES[device.type] // dtype.itemsize // 4096, 4096, dtype=dtype, device=device)
    target, row = torch.empty_like(source), source[0].clone()
    copy = _fastest(lambda: target.copy_(source), device, turns)
    read = _fastest(lambda: torch.mv(source, row), device, turns)
    return max(2 * source.nbytes / copy, source.nbytes / read)


def _matrix_rate(placement: Placement, turns: int) -> float:
    device, dtype = placement.device, placement.dtype
    rows, inner, columns = _PRODUCT[device.type]
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(columns, inner, dtype=dtype, device=device)
    products: list[Callable[[], object]] = [lambda: torch.mm(left, right.T)]
    if placement.quant in FORMATS:
        packed = pack_weight(right, None, placement.quant)
        products.append(lambda: packed(left))
    seconds = min(_fastest(product, device, turns) for product in products)
    return 2.0 * rows * inner * columns / seconds


@torch.inference_mode()
def _fastest(run: Callable[[], object], device: torch.device, turns: int) -> float:
    """Seconds of the fastest of `turns` runs, after one that does not count."""
    best = float("inf")
    for turn in range(turns + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - began) if turn else best
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
