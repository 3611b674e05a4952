"""`slipstream bench verifiers`: what verifiers gain for one model and its draft, against what they cost in quality.

Acceptance, quality and bias with bootstrap intervals, and tokens per second, of every verifier over values of its knob;
`strict` is the reference. `verifiers_engine.py` says how it is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, verifiers_report
from benchmarks.drafts_engine import Served
from benchmarks.drafts_engine import Variant as Drafted
from benchmarks.processes import OtherLoad
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_engine import answers, speeds
from benchmarks.verifiers_options import Options, parse, public, say
from benchmarks.verifiers_report import NOTES, Found
from benchmarks.verifiers_task import Group, general, task
from benchmarks.verifiers_variants import Variant, offered, variants
from engine.cluster.process import prepare_threads
from engine.config import DraftConfig, EngineConfig, ParallelConfig, VerifierConfig
from engine.errors import SlipstreamError
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR
from engine.tokenizer.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, write what was asked for."""
    options = parse(arguments)
    prepare_threads(EngineConfig(parallel=ParallelConfig(threads=options.load.threads)))  # before torch is imported
    try:
        if options.png:
            from benchmarks import verifiers_picture  # noqa: F401  # may be missing what it needs: better now
        with OtherLoad(()) as others:
            found, notes = measure(options)
    except (BenchmarkError, SlipstreamError) as error:
        say(f"slipstream: {error}")
        return 1
    for title, rows in verifiers_report.tables(found):
        print(f"{title}\n\n{report.table(rows)}\n")
    print("\n".join((*NOTES, *notes)))
    print(f"\n{report.machine()}; commit {report.git_commit()}; other processes: {others.cores:.2f} cores")
    write(options, public(arguments), found, notes, others.cores)
    return 0


def measure(options: Options) -> tuple[Found, list[str]]:
    """Load the pair, run both passes; and what there is to remark. Raises BenchmarkError and SlipstreamError."""
    folder = resolve(options.model, CACHE_DIR.expanduser())
    tokenizer, groups = Tokenizer.load(folder), _groups(options)
    whole = _served(folder, options, adaptive=False)
    chosen, notes = _variants(whole, options)
    found = answers(whole, tokenizer, chosen, groups, options)
    rows = verifiers_report.rows(found, chosen, groups)
    if options.speed == "none":
        return Found(tuple(rows), ()), notes
    if options.speed == "adaptive":
        whole = _served(folder, options, adaptive=True)
    timed = speeds(whole, tokenizer, chosen, groups[0], options)
    notes.append(f"Speeds: questions of {groups[0].name}, drafts {_LENGTHS[options.speed]}.")
    return Found(tuple(rows), tuple(timed)), notes


_SETTINGS = (
    "temperatures",
    "prompts",
    "questions",
    "tokens",
    "samples",
    "rounds",
    "speed_tokens",
    "clients",
    "batches",
    "speed",
)
_LENGTHS = {"adaptive": "as long as pays", "whole": "verified whole"}


def _groups(options: Options) -> list[Group]:
    """The task first."""
    asked = [task(options.task, options.prompts, options.score, options.tokens)] if options.task else []
    return asked + ([general(options.sources, options.questions)] if options.sources else [])


def _served(folder: Path, options: Options, *, adaptive: bool) -> Served:
    drafter = options.drafter if options.draft or options.drafter != "auto" else "ngram"
    draft = DraftConfig(drafter, path=options.draft, adaptive=adaptive)
    served = Served(folder, Drafted(drafter, draft), options.load, VerifierConfig(head=options.head))
    say(f"loaded {options.model} and its draft, {'to be timed' if adaptive else 'drafts verified whole'}")
    return served


def _variants(served: Served, options: Options) -> tuple[list[Variant], list[str]]:
    """What is swept, and a remark on what of the default is not offered for this pair."""
    info = served.info()
    if options.chosen:
        return variants(options.wishes, info), []
    wishes, missing = offered(options.wishes, info)
    notes = [f"Not offered for this pair: {', '.join(missing)}."] if missing else []
    return variants(wishes, info), notes


def write(options: Options, command: str, found: Found, notes: Sequence[str], cores: float) -> None:
    """The files that were asked for."""
    if options.json:
        settings = {name: getattr(options, name) for name in _SETTINGS} | {"quant": options.load.quant}
        facts = {"options": settings, "notes": notes, **verifiers_report.record(found)}
        report.write_record(options.json, command, cores, facts)
    if options.markdown:
        pages = [f"{title}\n\n{report.markdown_table(rows)}" for title, rows in verifiers_report.tables(found)]
        text = "\n\n".join((f"`{command}`", *pages, *NOTES, *notes))
        options.markdown.write_text(text + "\n", encoding="utf-8")
    if options.png:
        from benchmarks.verifiers_picture import draw

        pair = " and ".join(Path(name).name for name in (options.model, options.draft or "look-up"))
        draw(found, f"Verifiers of {pair}", options.png)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
