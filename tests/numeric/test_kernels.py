"""The element-wise kernels, torch twins and native code alike, against plain loops in fp64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.kernels import native, ops, reference
from engine.kernels.layout import HeadLayout
from engine.runtime.kv_cache import LayerCache, LayerShape
from tests.numeric.native_kernels import VECTOR_VARIANTS as VARIANTS
from tests.numeric.native_kernels import build

ROWS = (0, 1, 2, 33)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["twin", *VARIANTS])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(None if request.param == "twin" else build(request.param))


class Kernels:
    """One implementation of all of them."""

    def __init__(self, library: native.Library | None) -> None:
        self.library = library

    def add_rms_norm(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self._call("add_rms_norm", *args, **kwargs)  # type: ignore[return-value]

    def gated_activation(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self._call("gated_activation", *args, **kwargs)  # type: ignore[return-value]

    def rope(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        slots: torch.Tensor,
        cache: LayerCache,
        layout: HeadLayout,
    ) -> torch.Tensor:
        if self.library is None:
            return reference.head_norm_rope_write(qkv, cos, sin, slots, cache, layout)
        rope = None if cos is None or sin is None else (cos, sin)
        return native.head_norm_rope_write(self.library, qkv, rope, slots, cache, layout)

    def _call(self, name: str, *args: object, **kwargs: object) -> object:
        if self.library is None:
            return getattr(reference, name)(*args, **kwargs)
        return getattr(native, name)(self.library, *args, **kwargs)


def noise(*size: int, seed: int = 0, stride: int = 0) -> torch.Tensor:
    """Random numbers; rows lie `stride` numbers further apart than they have to."""
    random = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size[:-1], size[-1] + stride, generator=random)[..., : size[-1]]


# ---- residual sum and norm ---------------------------------------------------------------------------------------


def naive_norm(row: list[float], weight: list[float], eps: float, offset: float) -> list[float]:
    scale = 1.0 / math.sqrt(sum(value * value for value in row) / len(row) + eps)
    return [value * scale * (offset + by) for value, by in zip(row, weight, strict=True)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 67, 576])
@pytest.mark.parametrize(("offset", "stride"), [(0.0, 0), (1.0, 5)])
def test_norm_equals_plain_loop(kernels: Kernels, rows: int, width: int, offset: float, stride: int) -> None:
    x, residual = noise(rows, width, stride=stride), noise(rows, width, seed=1, stride=2 * stride)
    weight = noise(width, seed=2)
    sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(x.tolist(), residual.tolist(), strict=True)]
    kept = x.clone()
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5, offset)
    expected = [naive_norm(row, weight.tolist(), 1e-5, offset) for row in sums]
    close(normed, expected)
    close(total, sums)
    assert total.data_ptr() == residual.data_ptr() and torch.equal(x, kept)

    out = noise(rows, width, seed=3, stride=1)
    normed, total = kernels.add_rms_norm(x, None, weight, 1e-5, offset, out)
    close(out, [naive_norm(row, weight.tolist(), 1e-5, offset) for row in x.tolist()])
    assert normed is out and total is x and torch.equal(x, kept)


def close(got: torch.Tensor, expected: list[list[float]], tolerance: float = 4e-6) -> None:
    want = torch.tensor(expected, dtype=torch.float64).reshape(got.shape)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_norm_of_a_row_with_nan_leaves_the_others_alone(kernels: Kernels) -> None:
    x, weight = noise(3, 20), noise(20, seed=1)
    clean, _ = kernels.add_rms_norm(x, None, weight, 1e-5)
    x[1, 7] = float("nan")
    spoiled, _ = kernels.add_rms_norm(x, None, weight, 1e-5)
    assert spoiled[1].isnan().all() and torch.equal(spoiled[[0, 2]], clean[[0, 2]])


# ---- gated activations -------------------------------------------------------------------------------------------

NAIVE: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * math.erfc(-x / math.sqrt(2)),
    "relu": lambda x: max(x, 0.0),
}


def test_every_activation_has_its_loop() -> None:
    assert set(NAIVE) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("kind", NAIVE)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "stride"), [(1, 0), (8, 3), (51, 0), (1536, 1)])
def test_gate_equals_plain_loop(kernels: Kernels, kind: str, rows: int, width: int, stride: int) -> None:
    gate_up = noise(rows, 2 * width, stride=stride) * 2
    gate_up[:, : width // 8] *= 10
    act = NAIVE[kind]
    expected = [[act(g) * u for g, u in zip(row[:width], row[width:], strict=True)] for row in gate_up.tolist()]
    close(kernels.gated_activation(gate_up, kind), expected)
    out = noise(rows, width, seed=1, stride=2)
    assert kernels.gated_activation(gate_up, kind, out) is out
    close(out, expected)


@pytest.mark.parametrize("kind", NAIVE)
def test_gate_far_out(kernels: Kernels, kind: str) -> None:
    """Saturation, signed zeros and NaN come out as in the formula."""
    gate = torch.tensor([[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, float("nan")]])
    got = kernels.gated_activation(torch.cat((gate, torch.ones_like(gate)), dim=-1), kind)[0]
    assert got[:4].abs().max() < 1e-6 and float(got[4]) == 200.0 and float(got[5]) == pytest.approx(1e30)
    assert got[6].isnan()


@pytest.mark.parametrize("variant", VARIANTS)
def test_exponential_is_exact_to_rounding(variant: str) -> None:
    """silu(x) = x e^x / (1 + e^x) shows the relative error of the vectorised e^x where x is far below 0."""
    x = -torch.linspace(17.0, 80.0, 20001)[None]
    got = native.gated_activation(build(variant), torch.cat((x, torch.ones_like(x)), dim=-1), "silu").double()
    wide = x.double()
    assert float((got / (wide * wide.exp() / (1 + wide.exp())) - 1).abs().max()) < 3.5e-7


# ---- head norms, rotation and the write into the pool ------------------------------------------------------------


def naive_section(
    section: list[float], heads: int, cos: list[float], sin: list[float], weight: list[float] | None, layout: HeadLayout
) -> list[list[float]]:
    """Normed and rotated heads of one row's queries or keys."""
    if weight is not None:
        size = len(weight)
        groups = [section[i : i + size] for i in range(0, len(section), size)]
        section = [value for group in groups for value in naive_norm(group, weight, layout.eps, layout.offset)]
    dim = len(section) // heads
    out = [section[i : i + dim] for i in range(0, len(section), dim)]
    half = len(cos) // 2
    for head in out:
        before = list(head)
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if layout.interleaved else (pair, pair + half)
            head[a] = before[a] * cos[a] - before[b] * sin[a]
            head[b] = before[b] * cos[b] + before[a] * sin[b]
    return out


HEADS = {
    "llama": (LayerShape(2, 16, 16), 16),
    "partial": (LayerShape(2, 20, 28), 12),
    "odd half": (LayerShape(1, 10, 3), 10),
    "wide": (LayerShape(3, 64, 64), 64),
    "no rotation": (LayerShape(2, 9, 9), 0),
}


@pytest.mark.parametrize(("rows", "interleaved"), [(0, False), (1, False), (2, True), (33, False)])
@pytest.mark.parametrize("size", HEADS)
@pytest.mark.parametrize("norm", ["none", "per head", "whole", "queries only"])
def test_rope_equals_plain_loop(kernels: Kernels, rows: int, size: str, norm: str, interleaved: bool) -> None:
    shape, rotary = HEADS[size]
    heads, dim = 2 * shape.kv_heads, shape.key_dim
    widths = {"none": (0, 0), "per head": (dim, dim), "whole": (heads * dim, shape.kv_heads * dim)}
    query_norm, key_norm = (noise(n, seed=n) if n else None for n in widths.get(norm, (dim, 0)))
    layout = HeadLayout(heads, interleaved, query_norm, key_norm, eps=1e-3, offset=0.5)
    qkv = noise(rows, heads * dim + shape.width, stride=3)
    cos, sin = noise(rows, rotary, stride=1), noise(rows, rotary, seed=1, stride=2)
    cache = LayerCache(noise(40, shape.width), shape)
    before = cache.joint.clone()
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(rows))[:rows]
    got = kernels.rope(qkv, cos if rotary else None, sin if rotary else None, slots, cache, layout)
    assert got.shape == (rows, heads, dim) and got.is_contiguous()
    weights = [None if weight is None else weight.tolist() for weight in (query_norm, key_norm)]
    for row, slot in enumerate(slots.tolist()):
        query, key, value = qkv[row].split([heads * dim, shape.kv_heads * dim, shape.kv_heads * shape.value_dim])
        turn = (cos[row].tolist(), sin[row].tolist())
        close(got[row], naive_section(query.tolist(), heads, *turn, weights[0], layout))
        close(cache.key[slot], naive_section(key.tolist(), shape.kv_heads, *turn, weights[1], layout))
        assert torch.equal(cache.value[slot].flatten(), value)
    others = [slot for slot in range(40) if slot not in slots.tolist()]
    assert torch.equal(cache.joint[others], before[others])


@pytest.mark.parametrize("slot", [-1, 4])
def test_slot_outside_the_pool_is_an_error(kernels: Kernels, slot: int) -> None:
    shape = LayerShape(1, 8, 8)
    pool = torch.zeros(6, shape.width)  # slot 4 of the four in the middle would be memory of somebody else
    with pytest.raises(IndexError):
        kernels.rope(noise(1, 24), None, None, torch.tensor([slot]), LayerCache(pool[1:5], shape), HeadLayout(1))
    assert not pool[5].any()


# ---- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_threads_changes_nothing(variant: str) -> None:
    library, before = build(variant), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            shape = LayerShape(2, 64, 64)
            cache = LayerCache(torch.zeros(700, shape.width), shape)
            qkv, cos, sin = noise(600, 4 * 64 + shape.width), noise(600, 64), noise(600, 64)
            results.append(
                [
                    *native.add_rms_norm(library, noise(600, 576), noise(600, 576), noise(576), 1e-5),
                    native.gated_activation(library, noise(600, 512), "silu"),
                    native.head_norm_rope_write(library, qkv, (cos, sin), torch.arange(600), cache, HeadLayout(4)),
                    cache.joint,
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_ops_serve_every_kind_of_tensor() -> None:
    """bf16, fp64, columns that are not adjacent, three dimensions: the twin takes what the native code can't."""
    weight = noise(12, seed=1)
    plain = ops.add_rms_norm(noise(4, 12), None, weight, 1e-5)[0]
    for x in (noise(4, 12).double(), noise(12, 4).T, noise(4, 12)[None], noise(4, 12).bfloat16()):
        x.copy_(noise(4, 12))
        normed, _ = ops.add_rms_norm(x, None, weight.to(x.dtype), 1e-5)
        tolerance = 0.05 if x.dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(normed.reshape(4, 12).float(), plain, rtol=tolerance, atol=tolerance)
        gated = ops.gated_activation(x, "silu")
        assert gated.dtype is x.dtype
        torch.testing.assert_close(
            gated.reshape(4, 6).float(), ops.gated_activation(noise(4, 12), "silu"), rtol=tolerance, atol=tolerance
        )
    shape = LayerShape(1, 4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        cache = LayerCache(torch.zeros(3, 8, dtype=dtype), shape)
        query = ops.head_norm_rope_write(noise(1, 16), None, None, torch.tensor([2]), cache, HeadLayout(2))
        assert torch.equal(query.flatten(), noise(1, 16)[0, :8])
        torch.testing.assert_close(cache.joint[2].float(), noise(1, 16)[0, 8:], rtol=0.01, atol=0.01)


def test_gradients_pass_through_ops() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = noise(2, 8).clone().requires_grad_()
        ops.add_rms_norm(x, None, torch.ones(8), 1e-5)[0].sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        weight = torch.ones(8, requires_grad=True)
        ops.add_rms_norm(noise(2, 8), None, weight, 1e-5)[0].sum().backward()
        assert weight.grad is not None and weight.grad.abs().sum() > 0
        pool = LayerCache(torch.zeros(3, 8), LayerShape(1, 4, 4))
        layout = HeadLayout(2, query_norm=torch.ones(4, requires_grad=True))
        ops.head_norm_rope_write(noise(1, 16), None, None, torch.tensor([2]), pool, layout).sum().backward()
        assert layout.query_norm is not None and layout.query_norm.grad is not None


def test_unknown_activation_is_an_error(kernels: Kernels) -> None:
    with pytest.raises(KeyError):
        kernels.gated_activation(noise(1, 4), "swish")


@pytest.mark.parametrize("variant", VARIANTS[:1])
def test_threads_are_torchs_own(variant: str) -> None:
    """One OpenMP runtime in the process, and no thread more than torch's own after native kernels ran on two."""
    code = """
import os, sys, torch
from engine.kernels import native
from tests.numeric.native_kernels import build
torch.set_num_threads(2)
library = build(sys.argv[1])
for _ in range(3):
    torch.randn(2000, 2000).add_(1)
    before = len(os.listdir("/proc/self/task"))
    native.gated_activation(library, torch.randn(600, 4096), "silu")
    after = len(os.listdir("/proc/self/task"))
    assert after == before >= 2, (before, after)
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}
assert len(runtimes) == 1, runtimes
"""
    done = subprocess.run([sys.executable, "-c", code, variant], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
