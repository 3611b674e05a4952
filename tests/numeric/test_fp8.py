"""fp8 weights, activations and pools: what rounding does, and where it is refused. GPUs' products: tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.kernels.fp8 import LARGEST, pack, round_reference, round_rows, rounded
from engine.kernels.reference import as_bytes
from engine.runtime.devices import place
from engine.runtime.fp8_linear import Fp8Linear
from engine.runtime.kv_cache import LayerShape, PagedKVCache
from engine.runtime.packing import pack_linears, rounded_numbers, weight_bytes
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def rows(count: int, width: int) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randn(count, width) * torch.logspace(-6, 3, count)[:, None]


def test_a_row_is_rounded_to_four_digits_of_its_largest_number() -> None:
    x = rows(9, 200)
    codes, scales = round_rows(x)
    assert codes.dtype is torch.float8_e4m3fn and torch.equal(codes.float().abs().amax(1), torch.full((9,), LARGEST))
    error = (codes.float() * scales[:, None] - x).abs()
    # Half a step of 3 binary digits, or of the least number that e4m3 has.
    assert bool((error <= torch.maximum(x.abs() / 16, scales[:, None] * 2.0**-10) * 1.0001).all())


def test_rows_of_nothing_and_of_no_numbers() -> None:
    x = rows(4, 32)
    x[0], x[1, 3], x[2, 4] = 0.0, float("nan"), float("inf")
    codes, scales = round_reference(x)
    assert bool((codes[:3].float() == 0).all()) and scales[0] == 1 and bool(scales[1:3].isnan().all())
    out = pack(torch.randn(16, 32)).multiply(x)
    assert bool((out[0] == 0).all() and out[1:3].isnan().all() and out[3].isfinite().all())


def test_a_product_is_that_of_the_rounded_numbers_whatever_the_batch() -> None:
    weight, x = torch.randn(48, 64), rows(6, 64)
    matrix = pack(weight)
    out = matrix.multiply(x)
    torch.testing.assert_close(out, rounded(x) @ matrix.unpack().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix.multiply(x[2:3]), out[2:3])
    assert float((out - x @ weight.T).norm() / (x @ weight.T).norm()) < 0.05


@pytest.mark.parametrize("weight", [torch.randn(10, 32), torch.randn(16, 40), torch.full((16, 16), float("inf"))])
def test_weights_that_it_can_not_hold(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a weight"):
        Fp8Linear(weight, None)


def test_packing_leaves_what_the_self_check_expects() -> None:
    """A whole model against itself with rounded numbers; its head is left as it is."""
    model = tiny_model("qwen2")
    head, ids = model.get_output_embeddings(), torch.arange(20)[None]
    before = weight_bytes(model)
    with torch.inference_mode():
        exact = model(input_ids=ids).logits
        with rounded_numbers(model, "fp8", (None, head)):
            expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, exact)
        packed = pack_linears(model, "fp8", head)
        got = model(input_ids=ids).logits
    assert packed == 4 * 7 and isinstance(model.get_output_embeddings(), nn.Linear)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4
    assert 0.01 < float((got - exact).abs().max() / exact.abs().max()) < 0.4
    assert weight_bytes(model) < 0.6 * before


def test_a_pool_in_fp8_keeps_what_it_was_given() -> None:
    pool = PagedKVCache((LayerShape(2, 8, 4),), 3, 4, torch.float8_e4m3fn, CPU)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 4)
    key[0, 0, 0], value[2, 1, 3] = 1e6, float("inf")
    layer, slots = pool.layers[0], torch.tensor([7, 1, 4])
    layer.write(slots, key, value)
    stored = as_bytes(layer.joint)[slots].view(torch.float8_e4m3fn).float()
    assert stored[0, 0] == LARGEST and not stored[2, -1] < LARGEST  # e4m3 has no infinity
    assert float((stored[1, :16] - key[1].flatten()).abs().max()) < 0.2
    pool.compact(slots, torch.tensor([8, 9, 10]))
    assert torch.equal(as_bytes(layer.joint)[8:11], as_bytes(layer.joint)[slots])


@pytest.mark.parametrize(("quant", "kv", "name"), [("fp8", "auto", "models.quant"), ("auto", "fp8_e4m3", "kv.dtype")])
def test_a_device_without_fp8_is_told(quant: str, kv: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: fp8 needs a CUDA device of compute capability 8.9 or newer"):
        place(ModelConfig("x", device="cpu", quant=quant), None, kv)
