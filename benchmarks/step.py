"""`slipstream bench step`: how long the engine's steps take, where the time goes, and what the machine allows at best.

No server, no scheduler, no tokenizer: one process loads the model as an engine process does and runs single steps
(`step_cases.py`). Each case is timed whole; the split into matrix products, attention, sampling and the rest comes from
steps of their own with a watch in them (`step_parts.py`). Beside it stands the floor: the bytes that the products and
attention must read and the operations they must do, over the bandwidth and matrix rate measured in the same run
(`step_ceilings.py`), the larger of both for each part. Activations, norms, sampling and Python have no floor here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from benchmarks import report
from benchmarks.processes import OtherLoad
from engine.cluster.process import prepare_threads
from engine.config import GRAPHS, EngineConfig, load
from engine.errors import ConfigError
from engine.hub.resolve import resolve
from engine.types import Phase, SamplingParams

if TYPE_CHECKING:
    from benchmarks.step_cases import Effort, Figures
    from benchmarks.step_ceilings import Ceilings
    from engine.runtime.devices import Placement

MODELS = Path(__file__).parent / "models"
# norms to other: of a native program's pass, by its own clock.
PARTS = ("gemm", "attention", "norms", "rope", "activation", "waiting", "other", "sampling", "rest", "host", "captured")


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, write what was asked for. Raises SlipstreamError for what can't be measured."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    config, folder = _model(options)
    prepare_threads(config)  # torch reads it when it is imported, so not a line earlier than that
    from benchmarks.step_cases import Bench, Effort, grid
    from benchmarks.step_ceilings import measure_ceilings
    from engine.runtime.devices import prepare_torch
    from engine.runtime.loading import load_checked

    cases = grid(options.batch, options.kv, options.query, options.prefill)
    effort = Effort(1, 3, 0.2, 1, 3) if options.quick else Effort(2, 5, options.seconds, 5, 20)
    sampling = SamplingParams(max_tokens=1, temperature=options.temperature, top_p=options.top_p, seed=1)
    prepare_torch(config.parallel)
    loaded = load_checked(config.model, folder, _say_phase, config.kv.dtype)
    bench = Bench(loaded, config.kv.block_size, cases, sampling)
    before = _load_of_others(effort)
    with OtherLoad(()) as during:
        ceilings = measure_ceilings(loaded.placement, effort.ceilings)
        figures = [_measured(bench.measure(case, effort)) for case in cases]
        if options.graphs != "off" and (options.graphs == "eager" or loaded.placement.device.type == "cuda"):
            from benchmarks.step_graphs import GraphBench

            capture = options.graphs == "auto"
            graphs = GraphBench(loaded, config.kv.block_size, options.temperature, options.draft_block, capture)
            cases = graphs.grid(options.batch, options.kv, options.query)
            figures += [_measured(graphs.measure(case, effort)) for case in cases]
        ceilings = ceilings.better(measure_ceilings(loaded.placement, effort.ceilings))
    loads = Loads(before, during.cores, _load_of_others(effort))
    run = Run(
        arguments, f"{config.model.name}: {loaded.numerics}", loaded.placement, bench.threads, ceilings, loads, figures
    )
    if options.output:
        options.output.write_bytes(msgspec.json.format(msgspec.json.encode(_record(run))) + b"\n")
    print(step_table(figures, ceilings))
    print(_footer(run))
    if options.png:
        from benchmarks.step_picture import draw

        draw(run, options.png)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="slipstream bench step", description="Time single steps of the engine beside what the machine allows."
    )
    model = made.add_mutually_exclusive_group()
    model.add_argument(
        "--model", metavar="MODEL", help="as for `slipstream serve` (default: the configuration's first)"
    )
    model.add_argument(
        "--dummy",
        metavar="NAME",
        help=f"random weights of {', '.join(sorted(path.name for path in MODELS.iterdir()))}, or FOLDER/config.json",
    )
    made.add_argument("--config", metavar="FILE", help="a YAML file as for `slipstream serve`")
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one value of it")
    made.add_argument("--batch", type=_numbers, default=(1, 8, 32), metavar="N,N", help="sequences (default: 1,8,32)")
    made.add_argument(
        "--kv", type=_numbers, default=(200,), metavar="N,N", help="tokens before the step (default: 200)"
    )
    made.add_argument(
        "--query", type=_numbers, default=(1, 8), metavar="N,N", help="tokens that each feeds, 1 decodes (default: 1,8)"
    )
    made.add_argument(
        "--prefill",
        type=_numbers,
        default=(512,),
        metavar="N,N",
        help="prompts of one sequence (default: 512; 0: none)",
    )
    made.add_argument("--temperature", type=float, default=0.0, help="of the draws (default: 0, the most likely token)")
    made.add_argument("--top-p", type=float, default=1.0, help="default: 1, off")
    made.add_argument(
        "--graphs",
        choices=GRAPHS,
        default="auto",
        help="captured steps beside the others, one step late: auto is on GPUs, eager does not capture (default: auto)",
    )
    made.add_argument(
        "--draft-block",
        type=int,
        default=0,
        metavar="N",
        help="with graphs, whole rounds with a random DFlash draft of 5 layers, blocks of N tokens (default: 0, none)",
    )
    made.add_argument("--seconds", type=float, default=2.0, help="per case (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="few steps: for a look, not for the record")
    made.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    made.add_argument("--output", type=Path, metavar="FILE", help="where to write everything as JSON")
    made.add_argument("--png", type=Path, metavar="FILE", help="where to draw the split (needs matplotlib)")
    return made


@dataclass(frozen=True, slots=True)
class Loads:
    """Cores that other processes kept busy, before, while and after the measurement."""

    before: float
    during: float
    after: float


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the numbers depend on, and the numbers."""

    arguments: Sequence[str]
    title: str
    placement: Placement
    threads: int
    ceilings: Ceilings
    loads: Loads
    figures: Sequence[Figures]


def step_table(figures: Sequence[Figures], ceilings: Ceilings) -> str:
    """One row per case, in milliseconds: the median step, shared out to its parts."""
    shown = [part for part in PARTS if any(part in row.parts_ms for row in figures)]
    rows = [["step", "ms", "tok/s", *shown, "floor", "x floor"]]
    for row in figures:
        parts = [report.show(row.ms * row.shares.get(part, 0.0)) for part in shown]
        floor = sum(row.floors_ms(ceilings).values())
        rate, times = 1e3 * row.case.tokens / row.ms, row.ms / floor
        rows.append([row.case.name, *map(report.show, (row.ms, rate)), *parts, *map(report.show, (floor, times))])
    return report.table(rows)


def _model(options: argparse.Namespace) -> tuple[EngineConfig, Path]:
    """The engine's configuration, and the folder of its model. Raises ConfigError and ModelLoadError."""
    overrides = list(options.set)
    if options.dummy is not None:
        folder = MODELS / options.dummy if (MODELS / options.dummy).is_dir() else Path(options.dummy).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--dummy: {options.dummy!r} is none of {MODELS.name}/, and no folder with a config.json")
        given = {"path": str(folder), "id": folder.resolve().name, "load_format": "dummy"}
        overrides = [*(f"models.0.{key}={json.dumps(value)}" for key, value in given.items()), *overrides]
    elif options.model is not None:
        overrides = [f"models.0.path={json.dumps(options.model)}", 'models.0.id=""', *overrides]
    config = load(options.config, tuple(overrides)).engines()[0]
    if config.model.load_format == "dummy":
        return config, Path(config.model.path)
    return config, resolve(config.model.path, options.cache_dir.expanduser(), _say)


def _record(run: Run) -> dict[str, object]:
    """A run as JSON, with where and when it was."""
    versions = {}
    for package in ("slipstream", "torch", "transformers", "numpy", "triton", "flash-attn"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "title": run.title,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["slipstream", "bench", "step", *run.arguments],
        "commit": report.git_commit(),
        "machine": report.machine(),
        "device": run.placement.name,
        "dtype": run.placement.dtype_name,
        "quant": run.placement.quant,
        "threads": run.threads,
        "python": sys.version.split()[0],
        "versions": versions,
        "other_load": asdict(run.loads),
        "load_average": os.getloadavg()[0],
        "ceilings": asdict(run.ceilings),
        "cases": [
            {"name": row.case.name, **asdict(row), "floors_ms": row.floors_ms(run.ceilings)} for row in run.figures
        ],
    }


def _footer(run: Run) -> str:
    rates, loads = run.ceilings, run.loads
    return "\n".join(
        (
            "",
            f"{run.title}; {run.threads} threads; {report.machine()}; commit {report.git_commit()}",
            f"ceilings of this run: {rates.bytes_per_second / 1e9:.1f} GB/s, "
            f"{rates.flops_per_second / 1e9:,.0f} GFLOP/s; milliseconds are medians; tok/s counts tokens fed",
            f"cores busy with other processes: {loads.before:.2f} before, {loads.during:.2f} while measuring, "
            f"{loads.after:.2f} after",
        )
    )


def _load_of_others(effort: Effort) -> float:
    with OtherLoad(()) as load:
        time.sleep(min(effort.seconds, 1.0))
    return load.cores


def _measured(figures: Figures) -> Figures:
    _say(f"{figures.case.name}: {report.show(figures.ms)} ms")
    return figures


def _say_phase(phase: Phase) -> None:
    _say(f"{phase.name}: {phase.seconds:.1f} s  {phase.detail}".rstrip())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _numbers(text: str) -> tuple[int, ...]:
    """A list such as 1,8,32; a lone 0 is the empty list."""
    parts = text.split(",")
    if text == "0":
        return ()
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,8,32")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
