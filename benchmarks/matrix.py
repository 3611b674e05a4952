"""How fast products with packed weights are, beside fbgemm, F.linear and what one core can do at best.

`python -m benchmarks.matrix`: one thread, each product by its own CPU time, all ways in turn, medians. Weights come
from memory: as many copies as no cache holds are used one after another.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from engine.kernels import native_matrix
from engine.kernels.build import FLAGS, SOURCES, compile_library, find_compiler, host_variants
from engine.kernels.matrix import pack
from engine.kernels.native import Library, open_library
from engine.kernels.native_matrix import FORMATS

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))  # outputs and inputs of the demo model
BATCHES = (1, 4, 8, 32, 128, 512)
COLD_BYTES = 80 << 20  # of fp16 weights: more than caches hold
PEAKS = Path(__file__).with_name("matrix_peaks.c")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to multiply. `run(x, copy)`; `nbytes` of weights are read."""

    name: str
    nbytes: int
    run: Callable[[torch.Tensor, int], object]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one core: bytes read, and operations (two per multiply-add), per second."""

    read: float
    floats: float
    bytes: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    variants = {variant.name: variant for variant in host_variants()}
    parser.add_argument("--variant", choices=list(variants), help="instruction set (default: the best here)")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], metavar="OUTxIN")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="ROWS")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="WAY", help=f"of {', '.join(FORMATS)}, fbgemm-*, fp32")
    options = parser.parse_args()
    compiler = find_compiler()
    if compiler is None or not variants:
        print("there are no native kernels here")
        return 1
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "fbgemm"
    variant = variants[options.variant] if options.variant else next(iter(variants.values()))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_library(compiler, variant, Path(folder) / "kernels.so")
        library = open_library(Path(folder) / "kernels.so")
        peaks = measure_peaks(compiler.path, variant.flags, Path(folder), options.turns)
        print(
            f"{variant.name}, one thread; at best {peaks.read / 1e9:.1f} GB/s read, {peaks.bytes / 1e9:.0f} Gop/s"
            f" of bytes, {peaks.floats / 1e9:.0f} of floats"
        )
        for shape in options.shapes:
            outputs, inputs = map(int, shape.split("x"))
            made = ways(library, outputs, inputs)
            chosen = [way for way in made if options.only is None or way.name in options.only]
            for batch in options.batches:
                show(chosen, outputs, inputs, batch, options.turns, peaks)
    return 0


def ways(library: Library, outputs: int, inputs: int) -> list[Way]:
    """All of them, each over its own copies of random weights."""
    copies = copies_of(outputs, inputs)
    weights = [torch.randn(outputs, inputs) / inputs**0.5 for _ in range(copies)]
    found = [_native(library, name, weights) for name in FORMATS]
    half = [torch.ops.quantized.linear_prepack_fp16(weight, None) for weight in weights]
    multiply = torch.ops.quantized.linear_dynamic_fp16
    found.append(Way("fbgemm-fp16", 2 * outputs * inputs, lambda x, copy: multiply(x, half[copy])))
    whole = [
        torch.ops.quantized.linear_prepack(
            torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8), None
        )
        for weight in weights
    ]
    dynamic = torch.ops.quantized.linear_dynamic
    found.append(Way("fbgemm-int8", outputs * inputs, lambda x, copy: dynamic(x, whole[copy])))
    found.append(Way("fp32", 4 * outputs * inputs, lambda x, copy: F.linear(x, weights[copy])))
    return found


def _native(library: Library, format: str, weights: list[torch.Tensor]) -> Way:
    packed = [pack(weight, format) for weight in weights]
    return Way(
        format,
        packed[0].nbytes,
        lambda x, copy: native_matrix.multiply(library, packed[copy].address, x, packed[copy].outputs),
    )


def copies_of(outputs: int, inputs: int) -> int:
    return max(1, COLD_BYTES // (2 * outputs * inputs))


def show(chosen: list[Way], outputs: int, inputs: int, batch: int, turns: int, peaks: Peaks) -> None:
    """One line per way: time, rate, bytes per second, and the share of what the core could do."""
    copies = copies_of(outputs, inputs)
    used = min(copies, max(1, int(2e10 / (2 * batch * outputs * inputs))))
    x, seconds = torch.randn(batch, inputs), [list[float]() for _ in chosen]
    for _ in range(turns):
        for way, times in zip(chosen, seconds, strict=True):
            way.run(x, copies - 1)
            began = time.thread_time()
            for copy in range(used):
                way.run(x, copy)
            times.append((time.thread_time() - began) / used)
    print(f"\n[{outputs} x {inputs}] batch {batch}")
    for way, times in zip(chosen, seconds, strict=True):
        took, operations = median(times), 2 * batch * outputs * inputs
        rate = peaks.bytes if way.name in ("int8", "int4", "fbgemm-int8") else peaks.floats
        limit = max(way.nbytes / peaks.read, operations / rate)
        print(
            f"  {way.name:12s} {took * 1e6:9.1f} us {operations / took / 1e9:7.1f} Gop/s"
            f" {way.nbytes / took / 1e9:6.1f} GB/s  limit / time {limit / took:5.2f}"
        )


def load_peaks(compiler: str, flags: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """`matrix_peaks.c`, compiled into this folder."""
    path = folder / "peaks.so"
    subprocess.run([compiler, *FLAGS, *flags, f"-I{SOURCES}", "-o", path, PEAKS, "-lm"], check=True)
    peaks = ctypes.CDLL(str(path))
    peaks.peak_floats.argtypes = peaks.peak_bytes.argtypes = [ctypes.c_int64]
    peaks.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return peaks


def measure_peaks(compiler: str, flags: tuple[str, ...], folder: Path, turns: int) -> Peaks:
    """Compiles and runs `matrix_peaks.c`."""
    peaks = load_peaks(compiler, flags, folder)
    lanes = 16 if any("avx512" in flag for flag in flags) else 8
    memory, loops = torch.ones(4 * COLD_BYTES, dtype=torch.uint8), 2_000_000
    return Peaks(
        memory.nbytes / _fastest(lambda: peaks.peak_read(memory.data_ptr(), memory.nbytes), turns),
        2 * 12 * lanes * loops / _fastest(lambda: peaks.peak_floats(loops), turns),
        2 * 12 * 4 * lanes * loops / _fastest(lambda: peaks.peak_bytes(loops), turns),
    )


def _fastest(run: Callable[[], object], turns: int) -> float:
    best = float("inf")
    for _ in range(turns):
        began = time.thread_time()
        run()
        best = min(best, time.thread_time() - began)
    return best


if __name__ == "__main__":
    raise SystemExit(main())
