"""What fusion gains: step times of one model, fused and not, taken in turns in one process.

`python -m benchmarks.fusion [--model demo] [--batch 1,8,32] [--prefill 512] [--rounds 40] [--output FILE]`. Both models
have the same packed weights, the same attention and pools of their own. Beside them stands the time of the fused
model's matrix products alone: what is left above that is everything else.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.processes import OtherLoad
from engine.cluster.process import prepare_threads
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.hub.resolve import resolve
from engine.models.adapter import DecoderAdapter
from engine.runtime.batch import SeqInput
from engine.runtime.building import fuse_and_pack
from engine.runtime.devices import choose_attention, place, prepare_torch
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.linear import PackedLinear
from engine.runtime.packing import pack_linears
from engine.runtime.runner import ModelRunner
from engine.runtime.weights import load_config, load_model

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of `history` tokens that feed `tokens` more each, and want the logits after the last."""

    name: str
    sequences: int
    tokens: int
    history: int

    def inputs(self) -> list[SeqInput]:
        end = self.history + self.tokens
        blocks = -(-end // BLOCK_SIZE)
        tables = [range(i * blocks, (i + 1) * blocks) for i in range(self.sequences)]
        return [SeqInput([7 + i] * self.tokens, self.history, table, end) for i, table in enumerate(tables)]

    def blocks(self) -> int:
        return self.sequences * -(-(self.history + self.tokens) // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds of each round, in pairs."""

    case: Case
    unfused: list[float]
    fused: list[float]
    products: list[float]

    def row(self) -> list[str]:
        gain = report.paired_ratios(self.fused, self.unfused, higher_is_better=False)
        medians = [statistics.median(values) for values in (self.unfused, self.fused, self.products)]
        rest = medians[1] - medians[2]
        return [self.case.name, *map(report.show, medians), report.show(rest), report.spread(gain)]


def main() -> None:
    options = _options()
    parallel = ParallelConfig(threads=options.threads)
    config = EngineConfig(model=ModelConfig(path=options.model), parallel=parallel)
    prepare_threads(config)
    prepare_torch(config.parallel)
    folder = resolve(options.model, options.cache_dir.expanduser())
    cases = [Case(f"decode, batch {n}", n, 1, options.history) for n in options.batch]
    cases += [Case(f"prefill, {n} tokens", 1, n, 0) for n in options.prefill]
    blocks = max(case.blocks() for case in cases)
    plain, _ = load(config.model, folder, blocks, fused=False)
    quick, levels = load(config.model, folder, blocks, fused=True)
    with OtherLoad(()) as others:
        results = [measure(case, plain, quick, options.rounds) for case in cases]
    print(f"{folder.name}, {torch.get_num_threads()} threads; fused: {levels}")
    heads = ["step", "unfused ms", "fused ms", "its products", "the rest", "times faster"]
    print(report.table([heads, *(result.row() for result in results)]))
    print(f"medians of {options.rounds} rounds in turns; other processes kept {others.cores:.2f} cores busy")
    if options.output:
        record = {"levels": levels, "other_cores": others.cores, "results": [asdict(result) for result in results]}
        options.output.write_text(json.dumps(record | {"machine": report.machine(), "commit": report.git_commit()}))


def load(config: ModelConfig, folder: Path, blocks: int, fused: bool) -> tuple[ModelRunner, str]:
    """The model as a worker serves it, or with packed weights alone; and what was fused."""
    model_config = load_config(folder)
    placement = place(config, torch.float32)
    adapter = DecoderAdapter(load_model(folder, model_config, placement.dtype, placement.device))
    shapes = adapter.probe()
    attention, _ = choose_attention(config.attention, placement.device, placement.dtype)
    levels = "nothing"
    if fused:
        levels = fuse_and_pack(adapter, shapes, attention, placement.quant)
    elif placement.quant == "fp16":
        pack_linears(adapter.model)
    cache = PagedKVCache(shapes, blocks, BLOCK_SIZE, placement.dtype, placement.device)
    return ModelRunner(adapter, cache, attention), levels


def measure(case: Case, plain: ModelRunner, quick: ModelRunner, rounds: int) -> Result:
    """Both models in turns, and in turns of who goes first, so that a slow moment of the machine meets both."""
    inputs = case.inputs()
    rows = [(i + 1) * case.tokens - 1 for i in range(case.sequences)]
    products = _products(quick, case)
    steps: list[Callable[[], object]] = [
        lambda: plain.forward(inputs, rows),
        lambda: quick.forward(inputs, rows),
        products,
    ]
    times: list[list[float]] = [[], [], []]
    gc.collect()
    for number in range(-3, rounds):  # the first ones warm up
        for which in (0, 1, 2) if number % 2 else (2, 1, 0):
            began = time.perf_counter()
            steps[which]()
            if number >= 0:
                times[which].append(1e3 * (time.perf_counter() - began))
    return Result(case, *times)


def _products(runner: ModelRunner, case: Case) -> Callable[[], None]:
    """All matrix products of one step, and nothing else."""
    layers = [part for part in runner.adapter.model.modules() if isinstance(part, PackedLinear | torch.nn.Linear)]
    rows = case.sequences * case.tokens
    fed = [(layer, torch.randn(rows, layer.in_features)) for layer in layers]
    head, wide = fed[-1]
    fed[-1] = (head, wide[: case.sequences])  # the head scores one row of each sequence

    @torch.inference_mode()
    def run() -> None:
        for layer, x in fed:
            layer(x)

    return run


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description="What fusion gains.")
    parser.add_argument("--model", default="demo", help="as for `slipstream serve`")
    parser.add_argument("--batch", type=_numbers, default=(1, 8, 32), metavar="N,N", help="sequences that decode")
    parser.add_argument("--prefill", type=_numbers, default=(512,), metavar="N,N", help="tokens of one prompt")
    parser.add_argument("--history", type=int, default=200, help="tokens before a decode step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write everything as JSON")
    return parser.parse_args()


def _numbers(text: str) -> Sequence[int]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
