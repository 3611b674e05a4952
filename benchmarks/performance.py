"""The performance report: `make bench-report`, or parts of it:

    python -m benchmarks.performance --parts servers,steps
    python -m benchmarks.performance --quick --contenders int8,llamacpp-q8_0
    python -m benchmarks.performance --parts none      # the page and the pictures anew, from the record

Nothing else should run on the machine. The parts are measured one after the other, the most important first, and each
is written down at once: a run that is cut has lost one part. Expected minutes on two cores: steps 3, servers 19 (3 of
them to start and warm everybody up, then --minutes of rounds), quality 3, host 1, front 2, growth 2. Peers that are
not set up are named with the command that does it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks import performance_record as record
from benchmarks.peers.__main__ import CACHE, venv_of
from benchmarks.peers.install import Place, say, weights
from benchmarks.performance_contenders import ALL, BY_NAME, CONTENDERS
from benchmarks.performance_page import page
from benchmarks.performance_parts import PROGRAMS, Runs, run
from benchmarks.performance_record import Json, Stopwatch
from benchmarks.processes import OtherLoad
from benchmarks.report import ROOT
from benchmarks.scenarios import NEW_TOKENS
from benchmarks.stream import BenchmarkError
from engine.errors import SlipstreamError
from engine.tokenizer.tokenizer import Tokenizer

PARTS = ("steps", "servers", "quality", "host", "front", "growth")  # the limits first: everything else refers to them
QUICK_FOLDER = ROOT / "build" / "performance"
Save = Callable[[Json], None]


@dataclass(frozen=True, slots=True)
class Files:
    """Where the report lies."""

    json: Path
    page: Path
    images: Path


def files(quick: bool, folder: Path | None) -> Files:
    """A quick run must not overwrite the record."""
    if folder is None and not quick:
        return Files(ROOT / "benchmarks/results/performance.json", ROOT / "docs/performance.md", ROOT / "docs/images")
    place = folder or QUICK_FOLDER
    return Files(place / "performance.json", place / "performance.md", place / "images")


def measure(options: argparse.Namespace, target: Files) -> bool:
    """Every part that was asked for; True if all of it could be measured."""
    command = " ".join(("python -m benchmarks.performance", *public(options.arguments)))
    whole = True
    for name in (part for part in PARTS if part in options.parts):
        watch, shown = Stopwatch(command), name
        say(f"\n== {name}")
        with OtherLoad(()) as load:

            def save(found: Json, name: str = shown, watch: Stopwatch = watch) -> None:
                parts = record.merged(record.read(target.json), name, watch.about(0.0), found)
                record.write(target.json, parts)

            try:
                found = _servers(options, save) if name == "servers" else _programs(name, options, target, save)
            except (BenchmarkError, SlipstreamError) as error:
                say(f"{name} failed: {error}")
                whole = False
                continue
        cores = _others(found) if name == "servers" else load.cores
        record.write(target.json, record.merged(record.read(target.json), name, watch.about(cores), found))
        try:
            report(target)
        except (ValueError, LookupError, OSError) as error:  # the page can be made later, what comes next can't
            say(f"the page could not be written after {name}: {error}")
            whole = False
        whole = whole and not found.get("failed")
    return whole


def _others(found: Json) -> float:
    """Servers measure what others do beside each figure; around the whole part the servers themselves would count."""
    measured = found["measurements"]
    assert isinstance(measured, list)
    loads = [one["other_load"] for one in measured]
    return sum(loads) / len(loads) if loads else 0.0


def _servers(options: argparse.Namespace, save: Save) -> Json:
    from benchmarks.performance_servers import Found, Plan
    from benchmarks.performance_servers import run as run_servers

    quick = options.quick
    plan = Plan(
        contenders=tuple(one for one in CONTENDERS if one.name in options.contenders),
        scenarios=options.scenarios,
        rounds=1 if quick else options.rounds,
        minutes=options.minutes,
        new_tokens=16 if quick else NEW_TOKENS,
        seed=int(time.time()) % 1_000_000,
    )
    place = Place(options.folder.expanduser().absolute(), options.cache_dir.expanduser(), dict(options.venv))
    place.folder.mkdir(parents=True, exist_ok=True)

    def keep(found: Found) -> None:
        save(found.record(plan))

    tokenizer = Tokenizer.load(weights("folder", "demo", place))
    return asyncio.run(run_servers(plan, place, tokenizer, keep)).record(plan)


def _programs(name: str, options: argparse.Namespace, target: Files, save: Save) -> Json:
    parts = record.read(target.json)
    earlier = msgspec.convert(parts[name].found, Runs) if name in parts else Runs()
    return run(PROGRAMS[name], target.images, options.quick, earlier, lambda runs: save(runs.found())).found()


def report(target: Files) -> None:
    """The page and the pictures, from the record."""
    parts = record.read(target.json)
    target.page.parent.mkdir(parents=True, exist_ok=True)
    target.page.write_text(page(parts), encoding="utf-8")
    try:
        from benchmarks.performance_picture import draw
    except ImportError:
        say("no pictures: they need matplotlib (pip install 'slipstream[bench]')")
        return
    draw(parts, target.images)


def public(arguments: Sequence[str]) -> list[str]:
    """The command line for the record, without this machine's folders."""
    hidden = ("--folder", "--venv", "--cache-dir", "--output")
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.partition("=")[0] in hidden:
            skip = not skip and "=" not in argument
            continue
        kept.append(argument)
    return kept


def _listed(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part != "none")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--parts", type=_listed(PARTS), default=PARTS, metavar="NAME,NAME", help=f"of {', '.join(PARTS)}")
    made.add_argument("--contenders", type=_listed(tuple(BY_NAME)), default=tuple(BY_NAME), metavar="NAME,NAME")
    made.add_argument("--scenarios", type=_listed(ALL), default=ALL, metavar="NAME,NAME", help=f"of {', '.join(ALL)}")
    made.add_argument("--rounds", type=int, default=3, help="at most (%(default)s)")
    made.add_argument("--minutes", type=float, default=16.0, help="for the rounds of the servers (%(default)s)")
    made.add_argument("--quick", action="store_true", help="a look, written to build/performance")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="write everything here, and leave docs/ alone")
    made.add_argument("--folder", type=Path, default=CACHE / "peers", help="of the peers (%(default)s)")
    made.add_argument("--venv", type=venv_of, action="append", default=[], metavar="NAME=FOLDER", help="of yours")
    made.add_argument("--cache-dir", type=Path, default=CACHE, help="our server's own setting")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.arguments = given
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # a `finally` ends the servers
    target = files(options.quick, options.output)
    try:
        whole = measure(options, target)
        report(target)
    except KeyboardInterrupt:
        return 130
    say(f"\nwritten: {target.json}, {target.page}, {target.images}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
