"""How costs grow with their sizes: `python -m benchmarks.growth`, drawn with `--picture FILE.png`.

Processor time of one thread: of scheduling (plan, update and message of a step; the worker in it computes nothing) over
the batch, the length of prompts and the length of the queue, and of the prefix cache over its size. With `--engine`
also the time of real steps of a model. Values are totals: "adding all" 10,000 requests is 10,000 additions, so that the
exponent of growth, fitted through the upper points on logarithmic axes, is 1 for linear costs and 0 for constant ones.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from benchmarks.growth_cases import Curve, cache_curves, scheduling_curves, waiting_curves
from benchmarks.processes import OtherLoad
from engine.cluster.memory import calm_collector

UPPER = 3  # points that the exponent is fitted through
LINEAR = 1.25  # above this a curve is reported: sorting costs n log n, and larger sets leave the caches


def exponent(points: tuple[tuple[int, float], ...]) -> float:
    """Slope of the least-squares line through the upper points, both axes logarithmic."""
    upper = [(math.log(size), math.log(max(value, 1e-9))) for size, value in points[-UPPER:]]
    x, y = (sum(values) / len(upper) for values in zip(*upper, strict=True))
    return sum((a - x) * (b - y) for a, b in upper) / sum((a - x) ** 2 for a, _ in upper)


def measured(arguments: argparse.Namespace) -> Iterator[Curve]:
    yield from scheduling_curves()
    yield from waiting_curves()
    yield from cache_curves()
    if arguments.engine:
        from benchmarks.growth_engine import engine_curves  # brings torch

        yield from engine_curves(arguments.engine, arguments.quant, arguments.cache_dir.expanduser())


def growth_table(curves: Iterable[Curve]) -> str:
    rows = [["", "from", "", "to", "", "each", "exponent"]]
    for one in curves:
        (low, first), (high, last) = one.points[0], one.points[-1]
        each = f"{report.show(last / high * 1000)} {'ns' if one.unit == 'us' else 'per 1000'}"
        values = [f"{low:,}", f"{report.show(first)} {one.unit}", f"{high:,}", f"{report.show(last)} {one.unit}", each]
        rows.append([f"{one.panel}: {one.name}", *values, f"{exponent(one.points):.2f}"])
    return report.table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", metavar="MODEL", help="also time real steps of this model, such as demo")
    parser.add_argument("--quant", default="fp16", help="its weights")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/slipstream"), help="the server's own setting")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    curves = []
    calm_collector()  # as an engine process does
    with OtherLoad({os.getpid()}) as load:
        for one in measured(arguments):
            print(f"{one.panel}: {one.name}", file=sys.stderr, flush=True)
            curves.append(one)
    print(growth_table(curves))
    print(f"\n{report.machine()}; {load.cores:.2f} cores busy beside; {report.git_commit()}")
    if arguments.json:
        command = f"python -m benchmarks.growth {shlex.join(sys.argv[1:])}".strip()
        found = [{**asdict(one), "exponent": exponent(one.points)} for one in curves]
        report.write_record(arguments.json, command, load.cores, {"curves": found})
    if arguments.picture:
        from benchmarks.growth_picture import draw

        draw(curves, arguments.picture)
    steep = [f"{one.panel}: {one.name}" for one in curves if exponent(one.points) > LINEAR]
    if steep:
        print(f"\nfaster than linear: {', '.join(steep)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
