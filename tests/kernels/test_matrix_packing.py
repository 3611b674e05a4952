"""What packed matrices hold: how well weights are kept, which ones exactly, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from engine.kernels import matrix as packing
from engine.kernels.matrix import PackedMatrix, pack
from engine.kernels.native_matrix import FORMATS, MATRIX, PANEL
from engine.runtime import linear
from engine.runtime.linear import NativeLinear, PackedLinear, pack_linear, pack_weight, packing_available

formats = pytest.mark.parametrize("format", FORMATS)
# Largest error over the largest weight of its group: half a step of fp16's 11 bits, 1/254, and 2/15/2 (a range may
# be twice the largest weight), each with a little for rounded scales; int4 may cut a twentieth off each end of a range.
LARGEST_ERROR = {"fp16": 2**-11, "int8": 1 / 254 + 1e-3, "int4": 0.2}


def random_weight(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs + inputs)) * 0.05


@formats
@pytest.mark.parametrize("shape", ((1, 1), (33, 31), (64, 64), (70, 100)))
@pytest.mark.parametrize("size", (1.0, 1e-6, 1e3))
def test_weights_are_kept(format: str, shape: tuple[int, int], size: float) -> None:
    """Of any size, as a matrix has a multiplier; fp16 has none, so tiny weights lose digits there as everywhere."""
    weight = random_weight(*shape) * (size if format != "fp16" else max(size, 1.0))
    kept = pack(weight, format).unpack()
    assert kept.shape == weight.shape and kept.dtype is torch.float32
    for first in range(0, shape[1], 32):
        group = slice(first, first + 32)
        error = (kept - weight)[:, group].abs().amax(1)
        assert (error <= LARGEST_ERROR[format] * weight[:, group].abs().amax(1)).all()


def decoded_q4_1(outputs: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of random Q4_1 blocks (w = d q + m), d and m. Whoever rounds by smallest and largest uses both ends."""
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (outputs, groups, 32), generator=random)
    codes[..., 5], codes[..., 20] = 0, 15
    scale = (torch.rand(outputs, groups, generator=random) * 0.02 + 1e-4).half()
    minimum = -(scale.float() * (torch.rand(outputs, groups, generator=random) * 15)).half().float()
    weight = codes * scale.float()[..., None] + minimum[..., None]
    return weight.flatten(1), scale.float(), minimum


def test_q4_1_blocks_are_recovered() -> None:
    weight, _, _ = decoded_q4_1(70, 3)
    assert torch.equal(pack(weight, "int4").unpack(), weight)


def test_q4_1_blocks_that_were_stored_as_fp16_keep_their_codes() -> None:
    weight, scale, _ = decoded_q4_1(70, 3)
    error = pack(weight.half().float(), "int4").unpack() - weight
    assert (error.abs().unflatten(1, (-1, 32)) < 0.05 * scale[..., None]).all()


def test_int4_is_closer_than_the_range_in_15_steps() -> None:
    """By an eighth in squares for normal numbers; no group is worse."""
    weight = random_weight(256, 96).unflatten(1, (-1, 32))
    low, high = torch.aminmax(weight, dim=-1, keepdim=True)
    base, step = low.half().float(), ((high - low) / 15).half().float()
    plain = ((weight - base) / step).round().clamp(0, 15) * step + base
    kept = pack(weight.flatten(1), "int4").unpack().unflatten(1, (-1, 32))
    ours, theirs = ((found - weight).square().sum(-1) for found in (kept, plain))
    assert (ours <= theirs * 1.001).all() and ours.sum() < 0.89 * theirs.sum()


def test_q8_0_blocks_are_recovered() -> None:
    """w = d q with a code of 127 in every block, as whoever rounds by the largest leaves it."""
    random = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (70, 3, 32), generator=random)
    codes[..., 9] = 127
    scale = (torch.rand(70, 3, generator=random) * 0.02 + 1e-5).half().float()
    weight = (codes * scale[..., None]).flatten(1)
    assert torch.equal(pack(weight, "int8").unpack(), weight)


def test_groups_without_a_range() -> None:
    """Zeros, and groups of one number."""
    weight = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 0.25), torch.full((2, 32), -3.0)], dim=1)
    for format in FORMATS:
        kept = pack(weight, format).unpack()
        torch.testing.assert_close(kept, weight, rtol=1e-3, atol=0)
        assert torch.equal(kept[:, :32], weight[:, :32])


@formats
def test_made_again_from_its_tensors(format: str) -> None:
    made = pack(random_weight(33, 40), format, torch.ones(33))
    again = PackedMatrix.from_tensors(format, 33, 40, {name: part.clone() for name, part in made.tensors().items()})
    x = random_weight(3, 40)
    assert torch.equal(again.multiply(x), made.multiply(x)) and torch.equal(again.unpack(), made.unpack())
    assert again.nbytes == made.nbytes == sum(part.nbytes for part in made.tensors().values())


def test_struct_says_what_it_holds() -> None:
    made = pack(random_weight(33, 40), "int4", torch.ones(33))
    tensors = made.tensors()
    addresses = [tensors[name].data_ptr() for name in ("codes", "scales", "minima", "bias")]
    assert MATRIX.pack(*made.fields) == MATRIX.pack(2, 32, 33, 40, *addresses, made.multiplier, 0)
    assert made.nbytes == 64 * 64 // 2 + 2 * 2 * 64 * 2 + 33 * 4 + 4  # two panels of two groups, scales and minima


@formats
def test_other_tensors_are_refused(format: str) -> None:
    tensors = pack(random_weight(33, 40), format).tensors()
    with pytest.raises(ValueError, match="codes of a matrix"):
        PackedMatrix(format, 33, 40, {**tensors, "codes": tensors["codes"][:-PANEL]})
    with pytest.raises(ValueError, match="codes of a matrix"):
        PackedMatrix(format, 33, 40, {**tensors, "codes": tensors["codes"].float()})
    with pytest.raises(ValueError, match="bias of a matrix"):
        PackedMatrix(format, 33, 40, {**tensors, "bias": torch.zeros(32)})
    with pytest.raises(ValueError, match=f"a matrix in {format} has"):
        PackedMatrix(format, 33, 40, {})


@formats
@pytest.mark.parametrize("bad", (1e5, -1e5, float("nan"), float("inf")))
def test_weights_that_fp16_cannot_hold(format: str, bad: float) -> None:
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[2, 3] = bad
    with pytest.raises(ValueError, match="larger than"):
        pack(layer.weight, format)
    assert pack_linear(layer, format) is layer


@formats
def test_layer(format: str) -> None:
    assert packing_available()
    plain = nn.Linear(40, 33)
    layer = pack_linear(plain, format)
    assert isinstance(layer, NativeLinear) and layer.packed_bytes == layer.matrix.nbytes
    x = random_weight(6, 40)
    with torch.inference_mode():
        flat = layer(x)
        assert torch.equal(layer(x.view(2, 3, 40)), flat.view(2, 3, 33)) and layer(x[0]).shape == (33,)
        exact = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(flat, exact, rtol=0, atol=1e-5 if format == "fp16" else 5e-3)


def test_without_native_code_fbgemm_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(linear, "library", lambda: None)
    monkeypatch.setattr(packing, "library", lambda: None)
    linear._tell_fallback.cache_clear()
    plain, x = nn.Linear(40, 33), random_weight(6, 40)
    with caplog.at_level(logging.WARNING):
        layers = [pack_linear(plain, "int8") for _ in range(3)]
    assert all(isinstance(layer, PackedLinear) for layer in layers) and packing_available()
    assert [record.message for record in caplog.records] == [
        "no native kernels: linear layers are packed to fp16 by fbgemm instead of int8"
    ]
    with torch.inference_mode():
        torch.testing.assert_close(layers[0](x), plain(x), rtol=0, atol=1e-3)
        twin = pack(plain.weight, "fp16", plain.bias).multiply(x)
    torch.testing.assert_close(twin, plain(x).detach(), rtol=0, atol=1e-3)


def test_gradients_are_refused_or_taken_by_the_twin() -> None:
    layer = pack_weight(random_weight(33, 40), None, "fp16")
    x = random_weight(2, 40).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand(2, 40), atol=1e-5)
