"""Runs in a process of its own, with TRITON_INTERPRET=1: the kernels' own code, operation by operation, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from engine.attention import device_plan, triton_plan, triton_step, work
from engine.attention.device_plan import uniform
from engine.attention.triton_paged import TritonPagedAttention
from engine.attention.triton_step import TritonStep
from engine.attention.work import Layout, Machine, Tile
from engine.kernels import fp8, reference, triton_draw, triton_ops
from engine.kernels.layout import HeadLayout
from engine.runtime.device_draw import RowDraws, draw_reference
from engine.runtime.kv_cache import LayerCache, LayerShape
from tests.kernels.cases import Case, Report
from tests.kernels.scenario import Scenario

assert not triton_step.COMPILED
HOPPER_SHARED_MEMORY = 232448
_dot = interpreter.InterpreterBuilder.create_dot
_choose_tile, _splits = work.choose_tile, work._splits


def _dot_of_bfloat16(builder, a, b, *rest):
    """The interpreter keeps bfloat16 as its 16 bits and would multiply those as integers."""
    if a.dtype == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle((part.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            for part in (a, b)
        )
    return _dot(builder, a, b, *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16


def attend(case: Case) -> Report:
    """One call against the reference. Rows that nothing wrote would show as NaN."""
    scenario = Scenario(case)

    def tile(rows: int, layout: Layout, machine: Machine) -> Tile:
        chosen = _choose_tile(rows, layout, machine)
        return chosen if case.tile is None else replace(chosen, block_m=case.tile[0], block_n=case.tile[1])

    def splits(work: torch.Tensor, kv_heads: int, slots: int) -> torch.Tensor:
        return _splits(work, kv_heads, slots) if case.splits is None else torch.full_like(work, case.splits)

    work.choose_tile, work._splits = tile, splits
    device_plan.choose_tile = tile
    step = prepare(scenario)
    error = scenario.error(scenario.attend(step))
    launches = [launch for made in step._launches.values() for launch in made]
    return Report(error, len(launches), max(int(launch.items[:, 5].max()) for launch in launches))


def plan_on_device(count: int, query: int, fold: int, kv_heads: int, window: int | None, top: int) -> list[int]:
    """The kernel's plan for many mixes of lengths against its twin's; how many items each had work for."""
    layout = Layout(fold, LayerShape(kv_heads, 128, 128), 2)
    batch = uniform(count, query, top, layout, Machine(132, HOPPER_SHARED_MEMORY), window is None, window)
    generator, used = torch.Generator().manual_seed(count), []
    for mix in range(4):
        lens = torch.randint(query, top + 1, (count,), generator=generator, dtype=torch.int32)
        if mix:  # a few long ones among many short ones, all of the longest, all of the shortest
            lens[min(mix, count) :] = (lens[0], query, top, query)[mix]
        items, merges = triton_plan.plan(lens, batch)
        expected = device_plan.plan_reference(lens, batch)
        assert torch.equal(items, expected[0]) and torch.equal(merges, expected[1])
        work = device_plan._key_tiles(lens.long(), batch)
        busy = items[items[:, 2] > 0].long()
        # Every tile of rows is there with all of its splits, once each.
        seen = (busy[:, 0] * batch.tiles + busy[:, 3]) * 1000 + busy[:, 4]
        splits = torch.zeros(batch.merges, dtype=torch.int64).index_put_(
            (busy[:, 0] * batch.tiles + busy[:, 3],), torch.ones(len(busy), dtype=torch.int64), accumulate=True
        )
        assert len(seen.unique()) == len(busy) and bool((splits >= 1).all()) and bool((splits <= work).all())
        assert torch.equal(splits, merges[:, 4].long())
        used.append(len(busy))
    return used


def draw_tokens(vocabulary: int) -> None:
    """The kernel's tokens against its twin's: greedy and drawn rows, ties, rows of no numbers, rows that lie apart."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(9, vocabulary + 3, generator=generator)[:, :vocabulary] * 3
    logits[4, 7], logits[5] = float("nan"), float("-inf")
    logits[6, vocabulary // 2 :] = logits[6].max() + 1
    logits[8, 0] = float("inf")
    rows = RowDraws(
        torch.randint(-(2**62), 2**62, (2, 9), generator=generator) * 2,
        torch.tensor([5, 0, 2**40, 7, 1, 2, 3, 4, 6]),
        torch.tensor([0.0, 1.0, 0.6, 1.7, 1.0, 1.0, 0.0, 1.3, 0.1]),
    )
    got = triton_draw.draw(logits, rows.keys, rows.position, rows.temperature)
    assert got.tolist() == draw_reference(logits, rows).tolist()
    assert got[[4, 5, 8]].tolist() == [-1] * 3 and int(got[6]) == vocabulary // 2


def prepare(scenario: Scenario) -> TritonStep:
    return TritonPagedAttention(Machine(scenario.case.processors, HOPPER_SHARED_MEMORY)).prepare(scenario.batch)


def attend_layers(case: Case, windows: tuple[int | None, ...]) -> list[float]:
    """The layers of one step: they differ in window, and share what can be shared. Errors as in `attend`."""
    scenario = Scenario(case)
    step = prepare(scenario)
    errors = []
    for window in windows:
        scenario.case = replace(case, window=window)
        errors.append(scenario.error(scenario.attend(step)))
    assert len(step._launches) == len(set(windows))
    return errors


def attend_empty(case: Case) -> list[float]:
    """Largest output of each sequence, when all keys of the first are taken away."""
    scenario = Scenario(case)
    scenario.batch.kv_lens[0] = 0
    got = scenario.attend(prepare(scenario))
    return [float(part.abs().max()) for part in got.split(scenario.batch.query_lens)]


def between_products(dtype: str) -> dict[str, float]:
    """Kernels of `triton_ops` against their twins, by name: the largest difference by the largest result."""
    kind, found = getattr(torch, dtype), {}
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*shape).to(kind) for shape in ((5, 102), (5, 102), (100,)))
    for added in (False, True):
        there, here = (residual[:, 1:101].clone() if added else None for _ in range(2))
        want = reference.add_rms_norm(x[:, :100], there, weight, 1e-6, 1.0)
        got = triton_ops.add_rms_norm(x[:, :100], here, weight, 1e-6, 1.0, None)
        found[f"norm, {added}"] = max(map(_difference, want, got))
    for name in reference.ACTIVATIONS:
        gate_up = torch.randn(5, 2 * 77).to(kind) * 3
        active = triton_ops.gated_activation(gate_up, name, None)
        found[name] = _difference(reference.gated_activation(gate_up, name), active)
    x = torch.randn(5, 200).to(kind) * torch.logspace(-3, 1, 5)[:, None].to(kind)
    x[1], x[2, 3], x[3, 4] = 0.0, float("nan"), float("-inf")
    (codes, scales), (expected, factors) = triton_ops.round_fp8(x), fp8.round_reference(x)
    assert torch.equal(scales, factors) or torch.equal(scales.isnan(), factors.isnan())
    rounded, right = codes.float(), expected.float()
    # The interpreter's own conversion forgets to carry where a number is rounded up to a power of two.
    carried = (rounded * 2 == right) & (right.abs().log2() % 1 == 0)
    # Nor does it round all ties to even.
    found["fp8"] = float(((rounded != right) & ~carried).sum()) / 1e5
    return found | _heads(kind)


def _heads(kind: torch.dtype) -> dict[str, float]:
    found: dict[str, float] = {}
    for interleaved in (False, True):
        for key_dim, value_dim, rotary, normed in ((16, 16, 16, True), (24, 16, 12, False), (32, 20, 0, True)):
            shape = LayerShape(2, key_dim, value_dim)
            qkv = torch.randn(7, 4 * key_dim + shape.width + 3).to(kind)[:, :-3]
            cos, sin = (torch.randn(7, rotary).to(kind) if rotary else None for _ in range(2))
            norms = [torch.randn(key_dim).to(kind) if normed else None for _ in range(2)]
            layout = HeadLayout(4, interleaved, norms[0], norms[1])
            slots, pools = torch.randperm(20)[:7], []
            queries = []
            for module in (reference, triton_ops):
                pools.append(LayerCache(torch.zeros(20, shape.width, dtype=kind), shape))
                queries.append(module.head_norm_rope_write(qkv, cos, sin, slots, pools[-1], layout))
            name = f"heads of {key_dim}, {rotary} rotated, {interleaved}"
            found[name] = max(_difference(*queries), _difference(*(pool.joint for pool in pools)))
    return found


def _difference(want: torch.Tensor, got: torch.Tensor) -> float:
    assert want.dtype is got.dtype and want.shape == got.shape
    return float((want.float() - got.float()).abs().max() / want.float().abs().max())
