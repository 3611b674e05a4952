"""The fixed text that formats are judged on: this project's licence, and questions of packages that are installed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import serve_datasets
from benchmarks.prompts import licence_text
from benchmarks.stream import BenchmarkError
from engine.tokenizer.tokenizer import Tokenizer

SOURCES = ("licence", "humaneval", "gsm8k")
PLAIN = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees because",
    "SELECT name, age FROM users WHERE",
    "The recipe needs 2 eggs, 150 g of flour and",
    "Q: What is 17 times 23?\nA:",
    "The difference between a virus and a bacterium is",
)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are read in one go, from their first on."""

    source: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """`windows` are read, `prompts` are answered; `missing` says which sources are not installed, and how to get them.

    `digest` names the tokens: figures with different digests must not be compared.
    """

    windows: tuple[Window, ...]
    prompts: tuple[tuple[int, ...], ...]
    missing: tuple[str, ...]

    @property
    def digest(self) -> str:
        told = repr(([window.ids for window in self.windows], self.prompts))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(window.source for window in self.windows))


def fixed_texts(tokenizer: Tokenizer, per_source: int, length: int, prompts: int) -> Texts:
    """Windows of `length` tokens, `per_source` tokens of each source, and `prompts` prompts of all in turn."""
    windows: list[Window] = []
    columns: list[Sequence[tuple[int, ...]]] = [[tuple(tokenizer.encode(text)) for text in PLAIN]]
    missing = []
    for source in SOURCES:
        try:
            texts = _texts(source)
        except BenchmarkError as error:
            missing.append(str(error))
            continue
        windows += [Window(source, ids) for ids in cut(tokenizer.encode("\n\n".join(texts)), length, per_source)]
        if len(texts) > 1:
            columns.append([_asked(tokenizer, text) for text in texts[:prompts]])
    return Texts(tuple(windows), in_turn(columns, prompts), tuple(missing))


def _texts(source: str) -> list[str]:
    if source == "licence":
        return [licence_text()]
    return [entry.content for entry in serve_datasets.read(source) if isinstance(entry.content, str)]


def _asked(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))


def cut(ids: Sequence[int], length: int, most: int) -> list[tuple[int, ...]]:
    """Whole windows of the first `most` ids; a rest shorter than a window is left out."""
    return [tuple(ids[start : start + length]) for start in range(0, min(len(ids), most) - length + 1, length)]


def in_turn(columns: Sequence[Sequence[tuple[int, ...]]], count: int) -> tuple[tuple[int, ...], ...]:
    """One of each column, then the next of each, until there are `count`."""
    longest = max(map(len, columns), default=0)
    return tuple([column[i] for i in range(longest) for column in columns if i < len(column)][:count])
