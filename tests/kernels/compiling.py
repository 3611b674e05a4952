"""Runs in a process of its own: compiles what a call would launch, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from engine.attention import triton_step
from engine.attention.triton_step import TritonStep
from engine.attention.work import Machine, Tile
from tests.kernels.cases import Case, Compiled
from tests.kernels.scenario import Scenario

assert triton_step.COMPILED
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448}  # what one program may have: A100, L4, H100 and H200
PROCESSORS = 132
_kernels: list[tuple[str, CompiledKernel]] = []


class AbsentGpu:
    """As much of a triton driver as compiling asks for. Each architecture is a device of its own, for the caches."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, _device: int) -> int:
        return 0


class CompileOnly:
    """Stands in for a kernel: the same arguments make the same specialisation, and nothing is launched."""

    def __init__(self, kernel: JITFunction) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_for(*args: object, **constants: object) -> None:
            _kernels.append((self._kernel.__name__, self._kernel.warmup(*args, grid=grid, **constants)))

        return compile_for


triton_step.paged_attention = CompileOnly(triton_step.paged_attention)
triton_step.merge_splits = CompileOnly(triton_step.merge_splits)


def compile_step(case: Case, architecture: int) -> list[Compiled]:
    """The kernels that this call would launch on that architecture, in order."""
    driver.set_active(AbsentGpu(architecture))
    _kernels.clear()
    scenario = Scenario(case)
    step = TritonStep(scenario.batch, Machine(PROCESSORS, SHARED_MEMORY[architecture], architecture == 90))
    scenario.attend(step)
    tiles = iter([launch.tile for made in step._launches.values() for launch in made])
    found: list[Compiled] = []
    for name, kernel in _kernels:
        shape = found[-1].tile if name == "merge_splits" else _shape(next(tiles))
        found.append(_describe(name, kernel, shape))
    return found


def _shape(tile: Tile) -> tuple[int, int, int]:
    return tile.block_m, tile.block_n, tile.warps


def _describe(name: str, kernel: CompiledKernel, tile: tuple[int, int, int]) -> Compiled:
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        kernel=name,
        tile=tile,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        binary=len(kernel.asm["cubin"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, from the tool that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(triton.knobs.cache.dir) / "looked_at.cubin"
    path.write_bytes(cubin)
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])
