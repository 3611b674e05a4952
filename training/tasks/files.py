"""Task files: JSON lines with a prompt and what its answer is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from engine.errors import ConfigError
from training.tasks.task import Item, entry

_PROMPTS = ("prompt", "question", "document")  # as GSM8K and summaries call it, too
_REFERENCES = ("reference", "answer", "summary")


def read(path: Path) -> list[Item]:
    """All items of a file. Raises ConfigError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    items = [_item(line, f"{path.name} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ConfigError(f"{path} holds no prompts")
    return items


def write(path: Path, items: Iterable[Item]) -> None:
    """A task file that `read` reads: one JSON object with prompt and reference (and tests, if any) in each line."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            values = {"prompt": item.prompt, "reference": item.reference, "tests": item.tests}
            told = {name: text for name, text in values.items() if text}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")


def shuffled(items: list[Item], seed: int) -> Iterator[Item]:
    """The items in an order that is a function of the seed."""
    order = list(items)
    Random(seed).shuffle(order)
    return iter(order)


def _item(line: str, where: str) -> Item:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {line[:60]!r}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object with prompt and reference")
    prompt = next((text for key in _PROMPTS if (text := entry(values, key, where))), "")
    reference = next((text for key in _REFERENCES if (text := entry(values, key, where))), "")
    tests = entry(values, "tests", where)
    if not prompt:
        raise ConfigError(f"{where} has no prompt")
    if not reference and not tests:
        raise ConfigError(f"{where} has neither a reference nor tests")
    return Item(prompt, reference, tests)
