"""What a step costs the engine's process besides the model: `python -m benchmarks.host`.

Real scheduler, pipelines, packing and sampling run over a model that takes no time (`host_rig.py`); the microseconds of
processor time that are left are the host's own, by part:

- core, schedule, update: the engine's loop around the worker;
- pipeline, referee, verifier, shaping, drafter: who decodes how; drafts and their verification;
- pack: from sequences to a batch on the device, block tables and attention's preparation included;
- sampler, laws, certainty: work on logits, which grows with the vocabulary (49,152 tokens here).

All of it on one thread, whose processor time is what is counted: what several threads share takes less in a server.
Each figure is the median of a few runs. On a machine with other work they are upper bounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.processes import OtherLoad
from engine.types import SamplingParams

GREEDY = SamplingParams(10_000_000, temperature=0.0, ignore_eos=True)
SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": replace(GREEDY, temperature=1.0),
    "top_p": replace(GREEDY, temperature=0.8, top_p=0.95),
    "top_k": replace(GREEDY, temperature=0.8, top_p=0.95, top_k=40),
    "logprobs": replace(GREEDY, logprobs=5),
}
PIPELINES = ("autoregressive", "ngram", "dflash", "masked_diffusion")
VERIFIERS = ("strict", "rejection")
PARTS = (
    *("schedule", "update", "core", "pipeline", "pack", "sampler"),
    *("drafter", "shaping", "referee", "verifier", "laws", "certainty"),
)
LEAST = 5  # steps of a run


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table for each pipeline and way to sample, write what was asked for."""
    options = parser().parse_args(arguments)
    from benchmarks.host_rig import Case, measure

    tables: dict[str, dict[int, dict[str, float]]] = {}
    with OtherLoad(()) as load:
        for pipeline in options.pipeline:
            for sampling in options.sampling:
                by_batch: dict[int, dict[str, float]] = {}
                for batch in options.batch:
                    case = Case(pipeline, batch, options.prompt, SAMPLINGS[sampling], options.verifier)
                    steps = max(LEAST, options.steps // batch)
                    runs = [measure(case, steps) for _ in range(options.runs)]
                    by_batch[batch] = {part: median(run.get(part, 0.0) for run in runs) for part in PARTS}
                tables[f"{pipeline}, {sampling}"] = by_batch
                print(
                    f"\n{pipeline}, {sampling}, {options.verifier}: microseconds a step\n{_table(by_batch)}", flush=True
                )
    if options.output:
        command = " ".join(("python -m benchmarks.host", *arguments))
        report.write_record(options.output, command, load.cores, {"microseconds": tables})
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.partition("\n")[0])
    made.add_argument("--pipeline", nargs="+", choices=PIPELINES, default=PIPELINES)
    made.add_argument("--sampling", nargs="+", choices=SAMPLINGS, default=("greedy",))
    made.add_argument("--verifier", choices=VERIFIERS, default="strict")
    made.add_argument("--batch", nargs="+", type=int, default=(1, 8, 32, 256))
    made.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    made.add_argument("--steps", type=int, default=1600, help="sequence-steps of a run: divided by the batch")
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return made


def _table(by_batch: dict[int, dict[str, float]]) -> str:
    """A column per batch, a row per part that takes any time; the sum, and what it is per sequence."""
    parts = [part for part in PARTS if any(found[part] for found in by_batch.values())]
    totals = {batch: sum(found.values()) for batch, found in by_batch.items()}
    rows = [["part", *(str(batch) for batch in by_batch)]]
    rows += [[part, *(report.show(found[part]) for found in by_batch.values())] for part in parts]
    rows.append(["all", *(report.show(total) for total in totals.values())])
    rows.append(["a sequence", *(report.show(total / batch) for batch, total in totals.items())])
    return report.table(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
