"""The command line of `slipstream bench diffusion`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.diffusion_variants import SWEEP, TIMED, VERIFIES, Wish, wish
from benchmarks.drafts_engine import Load
from benchmarks.drafts_options import count, counts
from engine.config import QUANTS
from training.tasks.loading import NAMES
from training.tasks.scoring import KINDS

PARTS = ("rules", "caches", "speed", "batch", "dual")
MODEL = "checkpoints/tiny-diffusion-full"
# What is asked where nothing is said, and with --quick: less than a minute for the models of checkpoints/.
_DEFAULTS = {"cases": 2000, "timed": 8, "rounds": 3, "clients": 16, "tokens": 256}
_QUICK = {"cases": 6, "timed": 2, "rounds": 1, "clients": 4, "tokens": 64}
_HELP = {
    "cases": "of the task, where nothing is timed",
    "timed": "cases that are timed in each round, or as many as are asked at once",
    "rounds": "of timing",
    "clients": "requests at once in batch, and where nothing is timed",
    "tokens": "of an answer at most: the canvas of full-attention models",
}
_QUICK_WORDS = {
    "rules": ("quota=1,4", "threshold=.9,.5", "factor=.75", "frechet=.25,-1"),
    "timed_rules": ("threshold=.9", "frechet=.25"),
    "alone": ("quota=1", "frechet=.25,-2"),
    "drafts": ("frechet=-2",),
    "verify": ("confidence=.5",),
}
_WORDS = {
    "rules": SWEEP,
    "timed_rules": TIMED,
    "alone": ("quota=1", "threshold=.9", "frechet=.9,.75,.5,.25,0,-1,-2,-4,-8"),
    "drafts": ("frechet=-1,-4",),
    "verify": VERIFIES,
}


@dataclass(frozen=True, slots=True)
class Options:
    """One run. The names of `_HELP` are its numbers; `words` hold rules, and verifies, by their flag."""

    model: str
    drafter: str
    task: str
    score: str
    parts: tuple[str, ...]
    words: dict[str, tuple[Wish, ...]]
    cache: str
    caches: tuple[str, ...]
    batches: tuple[int, ...]
    drafter_steps: tuple[int, ...]
    block_length: int
    load: Load
    cases: int
    timed: int
    rounds: int
    clients: int
    tokens: int
    samples: tuple[Path, ...]
    draw: tuple[Path, ...]
    json: Path | None
    markdown: Path | None
    png: Path | None


def parse(arguments: Sequence[str]) -> Options:
    """Read a command line; a mistake ends the program with a message that names the flag."""
    parser = _parser()
    given = parser.parse_args(arguments)
    defaults = _DEFAULTS | (_QUICK if given.quick else {})
    numbers = {key: value if getattr(given, key) is None else getattr(given, key) for key, value in defaults.items()}
    usual = _QUICK_WORDS if given.quick else _WORDS
    words = {key: tuple(getattr(given, key) or map(wish, told)) for key, told in usual.items()}
    for file in (given.json, given.markdown, given.png):
        if file is not None and not file.absolute().parent.is_dir():
            parser.error(f"{file}: there is no such folder")
    if given.draw and not given.png:
        parser.error("--draw: where to? Say --png FILE")
    return Options(
        model=given.model,
        drafter=given.drafter,
        task=given.task,
        score=given.score,
        parts=PARTS if given.quick and not given.parts else tuple(given.parts or ("rules", "caches", "speed")),
        words=words,
        cache=given.cache,
        caches=tuple(given.caches.split(",")) if given.caches else (),
        batches=tuple(given.batch or ((1, 4) if given.quick else (1, 4, 16))),
        drafter_steps=tuple(given.drafter_steps or ((4,) if given.quick else (2, 8))),
        block_length=given.block_length or 0,
        load=Load(given.quant, given.memory, given.threads),
        samples=tuple(given.samples or ()),
        draw=tuple(given.draw or ()),
        json=given.json,
        markdown=given.markdown,
        png=given.png,
        **numbers,
    )


def public(arguments: Sequence[str]) -> str:
    """The command for a record that others read: of paths outside the current folder only the last name."""
    return " ".join(("slipstream bench diffusion", *map(_public, arguments)))


def _public(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return flag + equals + (Path(value).name if value.startswith(("/", "~", "..")) else value)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="slipstream bench diffusion",
        description="Accuracy, tokens per second and per forward of a masked-diffusion model: rule, cache, batch.",
    )
    made.add_argument("model", nargs="?", default=MODEL, metavar="MODEL", help="default: %(default)s")
    made.add_argument("--drafter", default="", metavar="MODEL", help="for dual: a fast model with the same tokenizer")
    named = ", ".join(NAMES)
    made.add_argument(
        "--task", "--tasks", default="worksheet", metavar="TASK", help=f"{named}, or FILE.jsonl (worksheet)"
    )
    made.add_argument(
        "--score", default="", choices=tuple(KINDS), help="how answers of a file are scored (its own way)"
    )
    made.add_argument("--parts", type=_parts, metavar="PART,PART", help=f"of {', '.join(PARTS)} (rules,caches,speed)")
    shape = "NAME[:KNOB][=VALUE,VALUE]"
    for flag, said in (
        ("rules", "swept in rules"),
        ("timed-rules", "of caches, speed and batch"),
        ("alone", "of the drafter alone in dual"),
        ("drafts", "that draft in dual"),
        ("verify", "of drafts in dual, with their thresholds"),
    ):
        usual = " ".join(_WORDS[flag.replace("-", "_")])
        made.add_argument(f"--{flag}", type=wish, nargs="+", metavar=shape, help=f"{said} (default: {usual})")
    made.add_argument(
        "--cache", default="", help="of the sweep (default: dual where there is full attention, else block)"
    )
    made.add_argument("--caches", default="", metavar="NAME,NAME", help="that are timed (default: all of the model's)")
    made.add_argument("--batch", type=counts, metavar="N,N", help="requests at once in speed (1,4,16)")
    made.add_argument("--drafter-steps", type=counts, metavar="N,N", help="denoise steps between two verifies (2,8)")
    made.add_argument("--block-length", type=count, metavar="N", help="tokens (default: the model's)")
    made.add_argument("--quant", choices=QUANTS, default="auto", help="default: auto")
    made.add_argument("--memory", default="256MiB", help="of each engine's KV pool (default: %(default)s)")
    made.add_argument("--threads", type=count, help="default: the machine's cores")
    for flag, default in _DEFAULTS.items():
        made.add_argument(f"--{flag}", type=count, metavar="N", help=f"{_HELP[flag]} (default: {default})")
    made.add_argument("--quick", action="store_true", help="all parts, a few cases each, to see that it runs")
    made.add_argument(
        "--samples",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="untimed answers: read from all of these, and new ones added to the first, to go on after a break",
    )
    made.add_argument("--draw", type=Path, nargs="+", metavar="FILE.json", help="measure nothing: draw these records")
    for flag in ("json", "markdown", "png"):
        made.add_argument(f"--{flag}", type=Path, metavar="FILE")
    return made


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return names
