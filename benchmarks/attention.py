"""The native attention by itself: what it reads a second, and multiplies, beside what one thread of this machine can.

    python -m benchmarks.attention [--variant avx2] [--threads 1] [--against OTHER.so]

Each case runs over several layers' pools, together larger than any cache, as a step does. Times are CPU seconds of
the calling thread (of all threads' wall time with --threads above 1), the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels import native
from engine.kernels.build import VARIANTS, compile_library, find_compiler, host_variants
from engine.kernels.layout import MODES, PagedBatch
from engine.kernels.native import Library, open_library
from engine.runtime.batch import AttentionMode, SeqInput, pack
from engine.runtime.kv_cache import LayerShape, PagedKVCache

BLOCK = 16
CPU = torch.device("cpu")
DEMO, TINY = (9, LayerShape(3, 64, 64)), (5, LayerShape(5, 32, 32))  # query heads and the pool of SmolLM2-135M, ...


@dataclass(frozen=True, slots=True)
class Case:
    """`count` sequences of `kv_len` keys, whose last `queries` tokens are fed."""

    name: str
    count: int
    queries: int
    kv_len: int
    model: tuple[int, LayerShape] = DEMO
    mode: str = "causal"
    layers: int = 6


CASES = (
    Case("decode 1 x 250", 1, 1, 250, layers=60),
    Case("decode 32 x 250", 32, 1, 250),
    Case("decode 1 x 4000", 1, 1, 4000, layers=10),
    Case("verify 8 of 250", 1, 8, 250, layers=60),
    Case("verify 32 x 8 of 250", 32, 8, 250),
    Case("prefill 512", 1, 512, 512),
    Case("prefill 512 of 2048", 1, 512, 2048),
    Case("canvas 8 x 32 of 128, head 32", 8, 32, 128, TINY, "bidirectional"),
    Case("canvas 1 x 128 of 128, head 32", 1, 128, 128, TINY, "bidirectional"),
    Case("tree 4 x 32 of 280", 4, 32, 280, DEMO, "tree"),
)


class Bench:
    """One case over one kind of pool, ready to run."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        heads, shape = case.model
        each = -(-case.kv_len // BLOCK)
        tables = torch.randperm(case.count * each, generator=torch.Generator().manual_seed(0)).view(case.count, each)
        inputs = [SeqInput([1] * case.queries, case.kv_len - case.queries, row, case.kv_len) for row in tables.tolist()]
        batch = pack(inputs, BLOCK, CPU, AttentionMode(case.mode), 32)
        self.batch = PagedBatch(
            *(batch.block_tables, batch.query_starts, batch.kv_lens, batch.positions, BLOCK),
            *(MODES.index(case.mode), 32, batch.tree_starts, batch.tree_masks),
        )
        self.pools = PagedKVCache((shape,) * case.layers, case.count * each, BLOCK, dtype, CPU).layers
        for pool in self.pools:
            pool.joint.copy_(torch.randn(1, shape.width) + torch.arange(len(pool.joint)).unsqueeze(1) % 7)
        self.query = torch.randn(case.count * case.queries, heads, shape.key_dim)
        keys = case.kv_len * case.queries
        if case.mode != "bidirectional":
            keys -= case.queries * (case.queries - 1) // 2
        self.flops = 2.0 * heads * case.count * keys * (shape.key_dim + shape.value_dim)
        self.bytes = float(case.count * case.kv_len * shape.width * dtype.itemsize)

    def seconds(self, library: Library, alone: bool) -> float:
        """Of one layer."""
        clock = time.thread_time if alone else time.perf_counter
        begin = clock()
        for pool in self.pools:
            native.paged_attention(library, self.query, pool, self.batch, scale=0.125)
        return (clock() - begin) / len(self.pools)


def ceilings(rounds: int) -> tuple[float, float]:
    """Bytes read and fp32 operations a second, of this many threads: a sum over 256 MB, and a product of 1024."""
    large, square = torch.ones(1 << 26), torch.randn(1024, 1024)
    reads, products = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        large.sum()
        reads.append(large.nbytes / (time.perf_counter() - begin))
        begin = time.perf_counter()
        square @ square
        products.append(2 * 1024**3 / (time.perf_counter() - begin))
    return max(reads), max(products)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--variant", choices=[each.name for each in VARIANTS], default=host_variants()[0].name)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--against", type=Path, help="another library of the same interface, to compare with")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        compiler, path = find_compiler(), Path(folder) / "kernels.so"
        assert compiler is not None, "a C compiler is needed"
        compile_library(compiler, next(each for each in VARIANTS if each.name == args.variant), path)
        libraries = [open_library(path), *([open_library(args.against)] if args.against else [])]
    rates = ceilings(5)
    print(f"{args.variant}, {args.threads} thread(s): {rates[0] / 1e9:.1f} GB/s read, {rates[1] / 1e9:.0f} GFLOP/s")
    rows = []
    for case in CASES:
        if args.cases not in case.name:
            continue
        for dtype in (torch.float32, torch.float16):
            bench = Bench(case, dtype)
            taken: list[list[float]] = [[] for _ in libraries]
            for _ in range(args.rounds):
                for seconds, library in zip(taken, libraries, strict=True):
                    seconds.append(bench.seconds(library, args.threads == 1))
            now, *other = (statistics.median(seconds) for seconds in taken)
            rows.append(_row(case, dtype, bench, now, rates, other))
    if args.output:
        args.output.write_text(json.dumps({"variant": args.variant, "threads": args.threads, "rows": rows}, indent=1))
    return 0


def _row(
    case: Case, dtype: torch.dtype, bench: Bench, now: float, rates: tuple[float, float], other: list[float]
) -> dict[str, object]:
    """The figures of a case; printed, too."""
    name = str(dtype).removeprefix("torch.float")
    limit = max(bench.bytes / rates[0], bench.flops / rates[1])
    bound = "bytes" if bench.bytes / rates[0] > bench.flops / rates[1] else "FLOPs"
    text = f"{case.name:32} fp{name}  {now * 1e6:8.1f} us  {bench.bytes / now / 1e9:6.1f} GB/s  "
    text += f"{bench.flops / now / 1e9:6.1f} GFLOP/s  {limit / now:5.2f} of the limit ({bound})"
    print(text + "".join(f"  x{before / now:.2f} of the other" for before in other), flush=True)
    figures = {"seconds": now, "bytes": bench.bytes, "flops": bench.flops, "limit_seconds": limit}
    return {"case": case.name, "pool": f"fp{name}", **figures}


if __name__ == "__main__":
    raise SystemExit(main())
