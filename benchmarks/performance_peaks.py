"""What the machine's cores can do at best, one and all together: `python -m benchmarks.performance_peaks --json FILE`.

Bytes read from memory, multiply-adds of floats and of bytes that stay in registers (`matrix_peaks.c`): no program can
be faster. An operation is a multiplication or an addition.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier, Thread

import msgspec
import torch

from benchmarks.matrix import load_peaks
from engine.kernels.build import find_compiler, host_variants

READ_BYTES = 256 << 20  # of each thread: more than caches hold
LOOPS = 2_000_000
TURNS = 5
CHAINS = 12  # of multiply-adds in a loop, as in the C code


@dataclass(frozen=True, slots=True)
class Peak:
    """Per second, of all threads together."""

    read: float
    floats: float
    bytes: float


def together(run: Callable[[int], object], threads: int) -> float:
    """Seconds from the common start of all threads to the end of the last; the best of some turns."""
    best = float("inf")
    for _ in range(TURNS):
        start, ended = Barrier(threads + 1), [0.0] * threads

        def one(place: int, start: Barrier = start, ended: list[float] = ended) -> None:
            start.wait()
            run(place)
            ended[place] = time.perf_counter()

        running = [Thread(target=one, args=(place,)) for place in range(threads)]
        for thread in running:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in running:
            thread.join()
        best = min(best, max(ended) - began)
    return best


def measure(peaks: ctypes.CDLL, lanes: int, threads: int) -> Peak:
    memory = [torch.ones(READ_BYTES, dtype=torch.uint8) for _ in range(threads)]
    read = together(lambda place: peaks.peak_read(memory[place].data_ptr(), READ_BYTES), threads)
    floats = together(lambda _: peaks.peak_floats(LOOPS), threads)
    bytes_ = together(lambda _: peaks.peak_bytes(LOOPS), threads)
    operations = 2.0 * CHAINS * lanes * LOOPS * threads
    return Peak(READ_BYTES * threads / read, operations / floats, 4 * operations / bytes_)


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.performance_peaks")
    made.add_argument("--threads", type=int, default=2, help="all cores (default: %(default)s)")
    made.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = made.parse_args(arguments)
    compiler, variant = find_compiler(), next(iter(host_variants()), None)
    if compiler is None or variant is None:
        print("error: no C compiler, or no processor that the kernels are for", file=sys.stderr)
        return 1
    lanes = 16 if any("avx512" in flag for flag in variant.flags) else 8
    with tempfile.TemporaryDirectory() as folder:
        peaks = load_peaks(compiler.path, variant.flags, Path(folder))
        found = {str(count): asdict(measure(peaks, lanes, count)) for count in sorted({1, options.threads})}
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    print(options.json.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
