"""The command line of `slipstream bench verifiers`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drafts_engine import Load
from benchmarks.drafts_options import count, counts
from benchmarks.drafts_prompts import SETS
from benchmarks.verifiers_variants import DEFAULTS, Wish, wish
from engine.config import QUANTS
from training.tasks.loading import NAMES
from training.tasks.scoring import KINDS

SPEEDS = ("adaptive", "whole", "none")
# What is asked where nothing is said, and with --quick: a minute for the demo model.
_DEFAULTS = {"prompts": 40, "questions": 40, "tokens": 96, "samples": 1, "rounds": 3, "speed_tokens": 48, "clients": 16}
_QUICK = {"prompts": 4, "questions": 4, "tokens": 32, "rounds": 1, "speed_tokens": 16}
_HELP = {
    "prompts": "of the task",
    "questions": "of all --sources together",
    "tokens": "of an answer at most, where the task does not say",
    "samples": "answers to each where they are drawn",
    "rounds": "of timing",
    "speed_tokens": "of a timed answer",
    "clients": "answers at once where nothing is timed",
}
_QUICK_DEFAULTS = ("strict", "block+drawn", "ensemble=.7", "ensemble=.7+drawn", "bounded=.1", "diversed=.5")


@dataclass(frozen=True, slots=True)
class Options:
    """One run. `prompts` of the task, `questions` of the data sets, `samples` answers to each where they are drawn."""

    model: str
    draft: str
    drafter: str
    head: str
    task: str
    score: str
    sources: tuple[str, ...]
    wishes: tuple[Wish, ...]
    chosen: bool  # were the verifiers named, or are they those that a model happens to offer
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]
    speed: str
    load: Load
    prompts: int
    questions: int
    tokens: int
    samples: int
    rounds: int
    speed_tokens: int
    clients: int
    json: Path | None
    markdown: Path | None
    png: Path | None


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> Options:
    """Read a command line; a mistake ends the program with a message that names the flag."""
    parser = _parser()
    given = parser.parse_args(arguments)
    defaults = _DEFAULTS | (_QUICK if given.quick else {})
    numbers = {key: value if getattr(given, key) is None else getattr(given, key) for key, value in defaults.items()}
    words = _QUICK_DEFAULTS if given.quick else DEFAULTS
    temperatures = tuple(dict.fromkeys(given.temperature or ((1.0,) if given.quick else (0.0, 1.0))))
    for file in (given.json, given.markdown, given.png):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no such folder")
    return Options(
        model=given.model,
        draft=given.draft,
        drafter=given.drafter,
        head=given.head,
        task=given.task,
        score=given.score,
        sources=tuple(given.sources if given.sources is not None else () if given.task else SETS),
        wishes=tuple(given.verifiers or map(wish, words)),
        chosen=bool(given.verifiers),
        temperatures=temperatures,
        batches=tuple(given.batch or ((1,) if given.quick else (1, 8))),
        speed=given.speed,
        load=Load(given.quant, given.memory, given.threads),
        json=given.json,
        markdown=given.markdown,
        png=given.png,
        **numbers,
    )


def public(arguments: Sequence[str]) -> str:
    """The command for a record that others read: of paths outside the current folder only the last name."""
    return " ".join(("slipstream bench verifiers", *map(_public, arguments)))


def _public(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    outside = value.startswith(("/", "~", ".."))
    return flag + equals + (Path(value).name if outside else value)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="slipstream bench verifiers",
        description="What each verifier brings for one model and its draft, and what it costs in quality.",
    )
    made.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="default: %(default)s")
    made.add_argument("--draft", default="", metavar="FOLDER", help="its draft's checkpoint (default: look-up, ngram)")
    made.add_argument("--drafter", default="auto", help="default: %(default)s, what the checkpoint is for")
    made.add_argument("--head", default="", metavar="FOLDER", help="the trained head of `diversed` for this pair")
    made.add_argument(
        "--task", default="", metavar="TASK", help=f"{', '.join(NAMES)}, or a file as for `slipstream train-verifier`"
    )
    made.add_argument("--score", default="", choices=tuple(KINDS), help="how its answers are scored (its own way)")
    made.add_argument(
        "--sources", nargs="*", metavar="SET", help=f"questions without a score: {', '.join(SETS)} or FILE.jsonl"
    )
    made.add_argument(
        "--verifiers",
        type=wish,
        nargs="+",
        metavar="NAME[:KNOB][=VALUE,VALUE][+drawn]",
        help=f"default: {' '.join(DEFAULTS)}",
    )
    made.add_argument(
        "--temperature", type=_temperature, action="append", metavar="T", help="may be given again (default: 0 and 1)"
    )
    made.add_argument("--batch", type=counts, metavar="N,N", help="requests at once where speed is measured (1,8)")
    made.add_argument(
        "--speed",
        choices=SPEEDS,
        default="adaptive",
        help="tokens per second with drafts as long as pays, as served; with whole ones; or not at all",
    )
    made.add_argument("--quant", choices=QUANTS, default="auto", help="of the target (default: auto)")
    made.add_argument("--memory", default="384MiB", help="of each engine's KV pool (default: %(default)s)")
    made.add_argument("--threads", type=count, help="default: the machine's cores")
    for flag, default in _DEFAULTS.items():
        said = f"{_HELP[flag]} (default: {default})"
        made.add_argument(f"--{flag.replace('_', '-')}", type=count, metavar="N", help=said)
    made.add_argument("--quick", action="store_true", help="few verifiers and short answers, to see that it runs")
    for flag in ("json", "markdown", "png"):
        made.add_argument(f"--{flag}", type=Path, metavar="FILE")
    return made


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 100")
    return value
