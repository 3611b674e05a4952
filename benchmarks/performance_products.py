"""The matrix products of one pass with nothing around them, and the rates of memory and kernels.

The products are called one after the other on the model's own packed weights; what as many calls cost that have next
to nothing to multiply is taken off, as a pass in one call needs none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.step_parts import bytes_of, is_matrix_product, plain_weight
from engine.kernels.matrix import pack
from engine.runtime.linear import NativeLinear, PackedLinear
from engine.runtime.loading import LoadedModel

ROWS = (1, 8, 32, 512)  # tokens of a pass
RATE_ROWS, RATE_SIDE = 256, 1024  # of the product whose rate is measured: 1 MB of weights in int8


def products(model: nn.Module) -> list[nn.Module]:
    """Every matrix product of a pass, in the order of the model."""
    return [module for module in model.modules() if is_matrix_product(module)]


def pass_seconds(layers: Sequence[nn.Module], rows: int, seconds: float) -> float:
    """The median time of all products for so many rows, without the cost of calling them."""
    inputs = {width: torch.randn(rows, width) for width in {_inputs(layer) for layer in layers}}
    calls = [(layer, inputs[_inputs(layer)]) for layer in layers]
    small = NativeLinear(pack(torch.ones(32, 32), "fp16")) if isinstance(layers[0], NativeLinear) else None
    nothing = torch.ones(1, 32)

    def everything() -> None:
        for layer, x in calls:
            layer(x)

    def empty() -> None:
        for _ in calls:
            assert small is not None
            small(nothing)

    whole = _median(everything, seconds)
    return whole if small is None else whole - _median(empty, seconds / 4)


def _inputs(layer: nn.Module) -> int:
    weight = plain_weight(layer)
    if isinstance(layer, NativeLinear):
        return layer.in_features
    if isinstance(layer, PackedLinear):
        return int(layer.in_features)
    assert weight is not None
    return int(weight.shape[1])


def kernel_rate(format: str, seconds: float) -> float:
    """Multiplications and additions per second of a product whose weights stay in the cache."""
    weight, x = torch.randn(RATE_SIDE, RATE_SIDE), torch.randn(RATE_ROWS, RATE_SIDE)
    layer: Callable[[torch.Tensor], torch.Tensor] = (
        nn.Linear(RATE_SIDE, RATE_SIDE, bias=False) if format == "none" else NativeLinear(pack(weight, format))
    )
    return 2.0 * RATE_ROWS * RATE_SIDE * RATE_SIDE / _median(lambda: layer(x), seconds)


@torch.inference_mode()
def _median(run: Callable[[], object], seconds: float) -> float:
    taken: list[float] = []
    run()
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def limits(loaded: LoadedModel, seconds: float) -> dict[str, object]:
    """All of it, ready for JSON; times in milliseconds."""
    layers = products(loaded.adapter.model)
    threads = torch.get_num_threads()
    found: dict[str, object] = {
        "quant": loaded.placement.quant,
        "calls": len(layers),
        "weight_bytes": sum(map(bytes_of, layers)),
        "gemm_ms": {str(rows): 1e3 * pass_seconds(layers, rows, seconds) for rows in ROWS},
    }
    rates: dict[str, float] = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        rates[str(count)] = kernel_rate(loaded.placement.quant, seconds / 4)
    torch.set_num_threads(threads)
    return {**found, "rates": rates}
