"""triton_paged compiled for Hopper (and older GPUs) without one: what real steps of real models would launch.

A specialisation is what triton makes of a call's own arguments (types, alignment, constants), so these are the very
kernels. Their numbers are printed with `pytest -s`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.kernels.cases import Case, Compiled

Compile = Callable[..., list[Compiled]]
DECODE = ((1, 1000),) * 4
LONG_DECODE = ((1, 20000),)
VERIFY = ((16, 1000),) * 2
PREFILL = ((512, 512),)
QWEN3_8B = Case(kv_heads=8, fold=4, dims=(128, 128), dtype="bfloat16")
GPT_OSS = Case(kv_heads=8, fold=8, dims=(64, 64), dtype="bfloat16", window=128, sinks=True)
GEMMA_2 = Case(kv_heads=4, fold=2, dims=(256, 256), dtype="bfloat16", window=4096, softcap=50.0)
STEPS = {
    "qwen3-8b decode": replace(QWEN3_8B, lengths=DECODE),
    "qwen3-8b long decode": replace(QWEN3_8B, lengths=LONG_DECODE),
    "qwen3-8b decode, page 256": replace(QWEN3_8B, lengths=DECODE, page=256),
    "qwen3-8b decode, page 7": replace(QWEN3_8B, lengths=DECODE, page=7),
    "qwen3-8b verify": replace(QWEN3_8B, lengths=VERIFY),
    "qwen3-8b verify tree": replace(QWEN3_8B, mode="tree", lengths=VERIFY),
    "qwen3-8b denoise": replace(QWEN3_8B, mode="bidirectional", lengths=VERIFY),
    "qwen3-8b prefill": replace(QWEN3_8B, lengths=PREFILL),
    "qwen3-8b prefill, page 256": replace(QWEN3_8B, lengths=PREFILL, page=256),
    "qwen3-8b block-causal prefill": replace(QWEN3_8B, mode="block_causal", lengths=PREFILL),
    "qwen3-8b mixed": replace(QWEN3_8B, lengths=DECODE + PREFILL),
    "gpt-oss decode": replace(GPT_OSS, lengths=DECODE),
    "gpt-oss prefill": replace(GPT_OSS, lengths=PREFILL),
    "gemma-2 decode": replace(GEMMA_2, lengths=DECODE),
    "gemma-2 verify": replace(GEMMA_2, lengths=VERIFY),
    "gemma-2 prefill": replace(GEMMA_2, lengths=PREFILL),
    "heads 256 wide, verify": Case(lengths=VERIFY, kv_heads=2, fold=4, dims=(256, 256), dtype="bfloat16"),
    "phi dimensions prefill": Case(lengths=PREFILL, kv_heads=8, fold=4, dims=(80, 80), dtype="float16"),
    "qwen3-8b captured decode": replace(QWEN3_8B, lengths=((1, 1000),) * 32, bound=31000, bounded=True),
    "qwen3-8b captured verify": replace(QWEN3_8B, lengths=((16, 1000),) * 32, bound=31000, bounded=True),
    "qwen3-8b decode, fp8 pool": replace(QWEN3_8B, lengths=DECODE, pool="float8_e4m3fn"),
    "qwen3-8b verify, fp8 pool": replace(QWEN3_8B, lengths=VERIFY, pool="float8_e4m3fn"),
    "qwen3-8b prefill, fp8 pool": replace(QWEN3_8B, lengths=PREFILL, pool="float8_e4m3fn"),
    "qwen3-8b captured draft": replace(QWEN3_8B, mode="bidirectional", lengths=((16, 99),) * 8, bounded=True),
    "everything at once": Case(
        "tree",
        lengths=VERIFY,
        kv_heads=8,
        fold=4,
        dims=(128, 128),
        dtype="bfloat16",
        window=512,
        softcap=30.0,
        sinks=True,
    ),
}
# What one program may have: A100, L4, H100 and H200.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def kernels(compiled: Compile, name: str, architecture: int) -> list[Compiled]:
    """Compiles a step and prints its row of the table; nothing may spill, or need more memory than there is."""
    found = compiled("compile_step", STEPS[name], architecture)
    for kernel in found:
        sys.stdout.write(f"\n{name:29} sm_{architecture} {kernel.row()}")
        assert kernel.binary > 1000
        assert kernel.stack == 0 and kernel.shared <= SHARED_MEMORY[architecture]
        if kernel.kernel == "paged_attention":
            assert kernel.async_copies > 0, "keys and values are not fetched ahead"
    return found


@pytest.mark.parametrize("name", STEPS)
def test_hopper(compiled: Compile, name: str) -> None:
    """Hopper's own matrix instructions wherever a tile has the 64 rows they take."""
    for kernel in kernels(compiled, name, 90):
        if kernel.kernel == "paged_attention":
            assert (kernel.wgmma > 0) == (kernel.tile[0] >= 64) and (kernel.mma > 0) == (kernel.tile[0] < 64)


@pytest.mark.parametrize("name", [name for name in STEPS if "qwen3-8b" in name and "prefill" not in name])
def test_decode_and_verify_are_split_over_their_keys(compiled: Compile, name: str) -> None:
    assert "merge_splits" in [kernel.kernel for kernel in compiled("compile_step", STEPS[name], 90)]


@pytest.mark.parametrize("architecture", [80, 89])
@pytest.mark.parametrize("name", ["qwen3-8b mixed", "gemma-2 prefill"])
def test_older_gpus(compiled: Compile, name: str, architecture: int) -> None:
    """Tiles shrink until they fit."""
    for kernel in kernels(compiled, name, architecture):
        assert kernel.wgmma == 0 and (kernel.mma > 0 or kernel.kernel == "merge_splits")


def test_float32_is_exact(compiled: Compile) -> None:
    """Its products use no matrix unit: those would round to tf32."""
    case = Case(lengths=VERIFY, kv_heads=2, fold=4, dims=(64, 64), dtype="float32")
    kernel = compiled("compile_step", case, 90)[0]
    assert kernel.wgmma == kernel.mma == 0 and kernel.stack == 0


@pytest.mark.parametrize(("model", "architecture"), [("qwen3-8b", 90), ("llama-3.1-8b", 90), ("gemma-3", 80)])
def test_what_stands_between_products(compiled: Compile, model: str, architecture: int) -> None:
    """Norms, heads, activations and draws: no registers spill. fp8 pools are for newer GPUs."""
    dtype = "bfloat16" if architecture >= 89 else "float16"
    found = compiled("compile_others", model, dtype, architecture)
    names = {"add_norm_rows", "head_rows", "gated_rows", "best_of_chunk", "best_of_row"}
    assert {kernel.kernel for kernel in found} - {"round_rows"} == names
    for kernel in found:
        sys.stdout.write(f"\n{model:29} sm_{architecture} {kernel.row()}")
        assert kernel.binary > 500 and kernel.stack == 0
