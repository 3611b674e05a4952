"""The command line of `python -m benchmarks.drafts`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drafts_engine import Load, Variant
from benchmarks.drafts_prompts import SETS
from engine.config import QUANTS, DraftConfig
from engine.errors import ConfigError

SHIPPED = (("dflash", "checkpoints/smollm2-135m-dflash"), ("eagle3", "checkpoints/smollm2-135m-eagle3"))
TREE = 32  # nodes of "+tree"
NONE = Variant("none", None)


@dataclass(frozen=True, slots=True)
class Options:
    """One run. `prompts` of each data set, `tokens` of each answer at most, so many `clients` at once."""

    what: str
    model: str
    variants: tuple[Variant, ...]
    sources: tuple[str, ...]
    quant: str
    load: Load
    prompts: int
    tokens: int
    rounds: int
    clients: int
    concurrency: tuple[int, ...]
    json: Path | None
    markdown: Path | None
    png: Path | None


# What is asked where nothing is said, and with --quick: a minute instead of ten.
_DEFAULTS = {
    "acceptance": {"prompts": 50, "tokens": 128, "rounds": 1, "clients": 8},
    "compare": {"prompts": 40, "tokens": 64, "rounds": 3, "clients": 8},
    "agreement": {"prompts": 50, "tokens": 128, "rounds": 1, "clients": 16},
}
_QUICK = {
    "acceptance": {"prompts": 6, "tokens": 48},
    "compare": {"prompts": 6, "tokens": 24, "rounds": 1},
    "agreement": {"prompts": 6, "tokens": 32},
}
_HELP = {
    "acceptance": "tokens per round and acceptance at each position, full drafts verified",
    "compare": "no drafts, look-up, DFlash, trees and EAGLE-3: speed, first token, memory, same output",
    "agreement": "greedy answers with drafts against those without, undisturbed and disturbed",
}


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def variant(text: str) -> Variant:
    """`none`, or DRAFTER[+tree][=FOLDER]. Raises argparse.ArgumentTypeError."""
    name, _, path = text.partition("=")
    drafter, plus, extra = name.partition("+")
    if not drafter or (plus and extra != "tree") or (name == "none" and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not none or DRAFTER[+tree][=FOLDER]")
    if name == "none":
        return NONE
    try:
        return Variant(name, DraftConfig(drafter, path=path, tree=TREE if plus else 0))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shipped(root: Path = Path()) -> list[Variant]:
    """Look-up, and the drafts under `checkpoints/` that are there."""
    found = [variant("ngram")]
    for name, folder in SHIPPED:
        if (root / folder / "config.json").is_file():
            found.append(variant(f"{name}={folder}"))
            if name == "dflash":
                found.append(variant(f"{name}+tree={folder}"))
    return found


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read a command line; a mistake ends the program with a message that names the flag."""
    parser = _parser()
    given = parser.parse_args(arguments)
    defaults = _DEFAULTS[given.what] | (_QUICK[given.what] if given.quick else {})
    numbers = {key: value if getattr(given, key) is None else getattr(given, key) for key, value in defaults.items()}
    variants = tuple(given.draft or shipped())
    if given.what != "acceptance":
        variants = (NONE, *(one for one in variants if one.draft is not None))
    names = [one.name for one in variants]
    if len(set(names)) < len(names):
        parser.error("argument --draft: two drafts have one name")
    quant = given.quant or ("none" if given.what == "agreement" else "auto")
    return Options(
        what=given.what,
        model=given.model,
        variants=variants,
        sources=tuple(given.sources or SETS),
        quant=quant,
        load=Load(quant, given.memory, given.threads),
        concurrency=(1, 32) if given.quick and not given.concurrency else tuple(given.concurrency or (1, 4, 16, 32)),
        json=given.json,
        markdown=given.markdown,
        png=given.png,
        **numbers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description="What drafts are worth.")
    kinds = parser.add_subparsers(dest="what", required=True)
    for what, text in _HELP.items():
        made = kinds.add_parser(what, help=text, description=text)
        made.add_argument("--model", default="demo", help="default: %(default)s")
        made.add_argument(
            "--draft",
            type=variant,
            action="append",
            metavar="DRAFTER[+tree][=FOLDER]",
            help="may be given again (default: ngram, and what is under checkpoints/)",
        )
        made.add_argument("--sources", nargs="+", metavar="SET", help=f"{', '.join(SETS)}, or FILE.jsonl")
        made.add_argument("--quant", choices=QUANTS, help="of the target (default: auto; for agreement none, exact)")
        made.add_argument("--memory", default="384MiB", help="of each engine's KV pool (default: %(default)s)")
        made.add_argument("--threads", type=count, help="of every engine (default: the machine's cores)")
        for flag in ("prompts", "tokens", "rounds", "clients"):
            made.add_argument(f"--{flag}", type=count, help=f"default: {_DEFAULTS[what][flag]}")
        made.add_argument("--concurrency", type=counts, metavar="N,N", help="of compare (default: 1,4,16,32)")
        made.add_argument("--quick", action="store_true", help="few and short answers, to see that it runs")
        for flag in ("json", "markdown", "png"):
            made.add_argument(f"--{flag}", type=Path, metavar="FILE")
    return parser


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def counts(text: str) -> list[int]:
    """Whole numbers above 0 between commas."""
    return [count(part) for part in text.split(",")]
