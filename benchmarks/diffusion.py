"""`slipstream bench diffusion`: a masked-diffusion model by unmask rule, cache and requests at once.

Five parts over one task. `rules`: accuracy against tokens per forward over the knobs of all rules. `caches`: accuracy
of some by cache. `speed`: their tokens per second. `batch`: requests at once against one by one. `dual`: DualDiffusion
against its drafter alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import diffusion_batch, diffusion_dual, diffusion_report, diffusion_rules, diffusion_speed, report
from benchmarks.diffusion_dual import ALONE, Arm, dual_arms
from benchmarks.diffusion_engine import Served
from benchmarks.diffusion_options import Options, parse, public
from benchmarks.diffusion_report import NOTES, Found
from benchmarks.diffusion_samples import Kept
from benchmarks.diffusion_variants import Variant, Wish, variants, wish
from benchmarks.drafts_options import say
from benchmarks.processes import OtherLoad
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_task import Group, task
from engine.cluster.process import prepare_threads
from engine.config import EngineConfig, ParallelConfig
from engine.diffusion import DiffusionParams
from engine.errors import SlipstreamError
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR

_SETTINGS = ("cases", "timed", "rounds", "clients", "tokens", "block_length", "batches")


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, write what was asked for."""
    options = parse(arguments)
    prepare_threads(EngineConfig(parallel=ParallelConfig(threads=options.load.threads)))  # before torch is imported
    try:
        if options.png:
            from benchmarks import diffusion_picture  # noqa: F401  # may be missing what it needs: better now
        if options.draw:
            found, cores = diffusion_report.merged([diffusion_report.read(file) for file in options.draw]), 0.0
        else:
            with OtherLoad(()) as others:
                found = measure(options)
            cores = others.cores
    except (BenchmarkError, SlipstreamError) as error:
        say(f"slipstream: {error}")
        return 1
    for title, rows in diffusion_report.tables(found):
        print(f"{title}\n\n{report.table(rows)}\n")
    print("\n".join(NOTES))
    if not options.draw:
        print(f"\n{report.machine()}; commit {report.git_commit()}; other processes: {cores:.2f} cores")
    write(options, public(arguments), found, cores)
    return 0


def measure(options: Options) -> Found:
    """All parts that were asked for. Raises BenchmarkError and SlipstreamError."""
    folder = resolve(options.model, CACHE_DIR.expanduser())
    group = task(options.task, max(options.cases, options.timed, options.clients), options.score, options.tokens)
    kept = Kept(options.samples)
    served = Served(folder, options.load, kept=kept)
    say(f"loaded {options.model}: {served.info.quant}")
    swept = cached = timed = dual = None
    batch: list[diffusion_batch.Batch] = []
    if "rules" in options.parts:
        swept = _rules(served, group, options)
    chosen = _timed(served, options) if {"caches", "speed", "batch"} & set(options.parts) else []
    asked = served.asked(group, options.tokens)
    if "caches" in options.parts:
        cached = diffusion_speed.accuracies(served, asked.first(options.cases), chosen, options.clients)
    if "speed" in options.parts:
        timed = diffusion_speed.measure(served, asked, chosen, options)
    if "batch" in options.parts:
        batch = diffusion_batch.measure(served, asked, chosen[1:], options)
    if "dual" in options.parts:
        dual = _dual(served, folder, group, options)
    return Found(swept, cached, timed, tuple(batch), dual)


def _base(served: Served, options: Options, cache: str) -> DiffusionParams:
    """What all variants share. Raises BenchmarkError."""
    offered = served.diffusion.caches
    if cache not in offered:
        raise BenchmarkError(f"--cache {cache}: this model offers {', '.join(offered)}")
    return DiffusionParams(cache=cache, block_length=options.block_length)


def _variants(served: Served, words: Sequence[Wish], options: Options, cache: str) -> list[Variant]:
    return variants(words, served.diffusion, options.tokens, _base(served, options, cache))


def _rules(served: Served, group: Group, options: Options) -> diffusion_rules.Swept:
    """The reference is always among them."""
    cache = options.cache or ("block" if served.diffusion.spec.block_causal else "dual")
    words = (*options.words["rules"], wish("threshold=.9"))
    chosen = _variants(served, words, options, cache)
    asked = served.asked(group, options.tokens).first(options.cases)
    return diffusion_rules.sweep(served, asked, chosen, options.clients)


def _timed(served: Served, options: Options) -> list[Variant]:
    """The plain sampler, without a cache where the model can do without, and the rules under every cache."""
    caches, words = options.caches or served.diffusion.caches, options.words["timed_rules"]
    rivals = [one for cache in caches for one in _variants(served, words, options, cache)]
    return [*_variants(served, [wish("quota=1")], options, served.diffusion.spec.caches[0]), *rivals]


def _dual(served: Served, folder: Path, group: Group, options: Options) -> diffusion_dual.Dual:
    """The drafter alone with all rules of --drafts; those of them that are fast draft. Raises BenchmarkError."""
    other = resolve(options.drafter, CACHE_DIR.expanduser()) if options.drafter else None
    drafter = served if other is None else Served(other, options.load, kept=served.kept)
    dual = Served(folder, options.load, "dual_diffusion", other, served.kept)
    cache = "block" if drafter.diffusion.spec.block_causal else "dual"
    alone = _variants(drafter, options.words["alone"], options, cache)
    exact = _variants(served, options.words["timed_rules"], options, served.diffusion.spec.caches[0])
    drafts = _variants(dual, options.words["drafts"], options, dual.diffusion.caches[0])
    arms = [
        Arm(ALONE, drafter, tuple(alone)),
        *dual_arms(dual, drafts, options.words["verify"], options.drafter_steps),
        Arm("served model alone, exact", served, tuple(exact)),
    ]
    chosen = Group(group.name, group.questions[: options.cases], group.chat, group.stop, group.max_tokens)
    sizes = diffusion_dual.parameters(folder), 0 if other is None else diffusion_dual.parameters(other)
    names = folder.name, "" if other is None else other.name
    return diffusion_dual.told(diffusion_dual.measure(arms, chosen, options), sizes, names)


def write(options: Options, command: str, found: Found, cores: float) -> None:
    """The files that were asked for."""
    if options.json:
        settings = {name: getattr(options, name) for name in _SETTINGS} | {"quant": options.load.quant}
        report.write_record(options.json, command, cores, {"options": settings, "found": found})
    if options.markdown:
        pages = [f"{title}\n\n{report.markdown_table(rows)}" for title, rows in diffusion_report.tables(found)]
        options.markdown.write_text("\n\n".join((f"`{command}`", *pages, *NOTES)) + "\n", encoding="utf-8")
    if options.png:
        from benchmarks.diffusion_picture import draw

        draw(found, f"Masked diffusion: {Path(options.model).name}", options.png)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
