"""Runs in a process of its own, with TRITON_INTERPRET=1: the kernels' own code, operation by operation, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from engine.attention import triton_step, work
from engine.attention.triton_paged import TritonPagedAttention
from engine.attention.triton_step import TritonStep
from engine.attention.work import Layout, Machine, Tile
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
    step = prepare(scenario)
    error = scenario.error(scenario.attend(step))
    launches = [launch for made in step._launches.values() for launch in made]
    return Report(error, len(launches), max(int(launch.items[:, 5].max()) for launch in launches))


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
