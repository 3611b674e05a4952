"""A task: prompts with references, and a score for what was answered. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from engine.errors import ConfigError

SPLITS = ("train", "test")
_HELD_OUT = 5  # every fifth item, by a hash of its prompt, is for tests alone


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and what its answer is compared with: `reference` text, or `tests` that are run behind the answer."""

    prompt: str
    reference: str = ""
    tests: str = ""


Score = Callable[[str, Item], float]


@dataclass(frozen=True, slots=True)
class Task:
    """Where items come from, how they are asked, and what an answer is worth.

    `chat`: prompts are a user's message, to go through the chat template; otherwise they are plain text to continue.
    `source(seed)` yields items, each a function of the seed and its place.
    """

    name: str
    kind: str  # how answers are scored: see `training.tasks.scoring`
    source: Callable[[int], Iterator[Item]]
    scoring: Score
    chat: bool = True
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def items(self, split: str, count: int, seed: int = 0) -> list[Item]:
        """`count` different items of a split, the same ones for the same seed; fewer where they run out.

        No item is in both splits, whatever the seeds: its prompt decides. Raises ConfigError for an unknown split, and
        where the split has none.
        """
        if split not in SPLITS:
            raise ConfigError(f"{self.name}: there is no split {split!r}, only {' and '.join(SPLITS)}")
        found = list(islice(_different(self.source(seed), split), count))
        if not found:
            raise ConfigError(f"{self.name}: none of its prompts belongs to the split {split!r}")
        return found

    def score(self, answer: str, item: Item) -> float:
        """What an answer is worth, 0 to 1."""
        return self.scoring(answer, item)


def held_out(item: Item) -> bool:
    """Is an item kept for tests?"""
    return hashlib.sha256(item.prompt.encode()).digest()[0] % _HELD_OUT == 0


def _different(items: Iterator[Item], split: str, patience: int = 20_000) -> Iterator[Item]:
    """Items of one split without those that were there before; gives up after so many of these in a row."""
    seen: dict[str, None] = {}
    idle = 0
    for item in items:
        idle += 1
        if held_out(item) == (split == "test") and item.prompt not in seen:
            seen[item.prompt] = None
            idle = 0
            yield item
        if idle > patience:
            return


def entry(values: Mapping[str, object], key: str, where: str) -> str:
    """A text of one line of a task file; empty if absent. Raises ConfigError."""
    value = values.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: {key} must be a text")
    return str(value)
