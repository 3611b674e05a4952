"""Runs in a process of its own: compiles what a call would launch, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from engine.attention import triton_plan, triton_step
from engine.attention.triton_step import TritonStep
from engine.attention.work import Machine, Tile
from engine.kernels import triton_draw, triton_ops
from engine.kernels.layout import HeadLayout
from engine.kernels.reference import ACTIVATIONS
from engine.runtime.kv_cache import LayerCache, LayerShape
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


for module, names in {
    triton_step: ("paged_attention", "merge_splits"),
    triton_plan: ("lay_out",),
    triton_draw: ("best_of_chunk", "best_of_row"),
    triton_ops: ("add_norm_rows", "head_rows", "gated_rows", "round_rows"),
}.items():
    for name in names:
        setattr(module, name, CompileOnly(getattr(module, name)))


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
        if name == "paged_attention":
            shape = _shape(next(tiles))
        found.append(_describe(name, kernel, (0, 0, 0) if name == "lay_out" else shape))
    return found


def compile_others(model: str, dtype: str, architecture: int) -> list[Compiled]:
    """What a decoding step of that model would launch besides products and attention."""
    driver.set_active(AbsentGpu(architecture))
    _kernels.clear()
    kind, pool = getattr(torch, dtype), torch.float8_e4m3fn if dtype == "bfloat16" else getattr(torch, dtype)
    width, heads, inner, vocabulary, normed = {
        "qwen3-8b": (4096, LayerShape(8, 128, 128), 12288, 151936, True),
        "llama-3.1-8b": (4096, LayerShape(8, 128, 128), 14336, 128256, False),
        "gemma-3": (640, LayerShape(1, 256, 256), 2048, 262144, True),
    }[model]
    tokens, queries = 16, 4 * heads.kv_heads
    x, weight = torch.empty(tokens, width, dtype=kind), torch.empty(width, dtype=kind)
    norm = torch.empty(heads.key_dim, dtype=kind) if normed else None
    cos = torch.empty(tokens, heads.key_dim)
    qkv = torch.empty(tokens, queries * heads.key_dim + heads.width, dtype=kind)
    slots = torch.empty(tokens, dtype=torch.int64)
    layout = HeadLayout(queries, query_norm=norm, key_norm=norm)
    triton_ops.add_rms_norm(x, x.clone(), weight, 1e-6, 0.0, None)
    triton_ops.add_rms_norm(x, None, weight, 1e-6, 1.0, None)
    for kept in (kind, pool):
        cache = LayerCache(torch.empty(64, heads.width, dtype=kept), heads)
        triton_ops.head_norm_rope_write(qkv, cos, cos, slots, cache, layout)
    for name in ACTIVATIONS:
        triton_ops.gated_activation(torch.empty(tokens, 2 * inner, dtype=kind), name, None)
    if pool is torch.float8_e4m3fn:
        triton_ops.round_fp8(x)
    keys, position, heat = torch.empty(2, tokens, dtype=torch.int64), slots, torch.empty(tokens)
    triton_draw.draw(torch.empty(tokens, vocabulary), keys, position, heat)
    return [_describe(name, kernel, (0, 0, 0)) for name, kernel in _kernels]


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
