"""What drafts are worth: `python -m benchmarks.drafts acceptance|compare|agreement [--draft dflash=FOLDER ...]`.

`acceptance`: tokens per round on held-out prompts, full drafts verified. `compare`: every drafter beside none, speed,
first token, memory and output. `agreement`: greedy answers with drafts are those without. Ten minutes each on two
cores; `--quick` takes one. Nothing else should run on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks import drafts_acceptance, drafts_agreement, drafts_compare, report
from benchmarks.drafts_options import Options, parse, say
from benchmarks.processes import OtherLoad
from benchmarks.stream import BenchmarkError
from engine.errors import SlipstreamError
from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR

Tables = Sequence[list[list[str]]]


def run(options: Options) -> tuple[Tables, object]:
    """The tables of one benchmark and its record. Raises BenchmarkError."""
    folder, title = resolve(options.model, CACHE_DIR.expanduser()), f"{options.model}: {options.what} of drafts"
    match options.what:
        case "acceptance":
            accepted = drafts_acceptance.measure(folder, options)
            if options.png:
                _pictures().draw_acceptance(accepted, title, options.png)
            return drafts_acceptance.tables(accepted), drafts_acceptance.record(accepted)
        case "compare":
            compared = drafts_compare.measure(folder, options)
            if options.png:
                _pictures().draw_speed(compared, title, options.png)
            return drafts_compare.tables(compared, options.quant), drafts_compare.record(compared)
    rungs = drafts_agreement.measure(folder, options)
    return drafts_agreement.tables(rungs, options.quant), drafts_agreement.record(rungs)


def _pictures():
    from benchmarks import drafts_picture  # on use: matplotlib may be missing

    return drafts_picture


def write(options: Options, arguments: Sequence[str], tables: Tables, found: object, cores: float) -> None:
    """The files that were asked for."""
    command = "python -m benchmarks.drafts " + " ".join(arguments)
    if options.json:
        report.write_record(options.json, command, cores, {"options": asdict(options), "found": found})
    if options.markdown:
        pages = "\n\n".join(report.markdown_table(rows) for rows in tables)
        options.markdown.write_text(f"`{command}`\n\n{pages}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    for file in (options.json, options.markdown, options.png):
        if file is not None and not file.absolute().parent.is_dir():
            say(f"error: {file}: there is no such folder")
            return 1
    try:
        with OtherLoad(()) as others:
            tables, found = run(options)
    except (BenchmarkError, SlipstreamError) as error:
        say(f"error: {error}")
        return 1
    print("\n\n".join(report.table(rows) for rows in tables))
    print(f"\n{report.machine()}; commit {report.git_commit()}; other processes: {others.cores:.2f} cores")
    write(options, arguments, tables, found, others.cores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
