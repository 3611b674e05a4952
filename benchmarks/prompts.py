"""Prompts of given token counts, cut from this repository's licence text. No data set is needed, and none is kept.

Every prompt begins with a number of its own, so that no two share a cache block: a prefix cache helps only where a
scenario gives the same prompt twice. A different `seed` gives different numbers: a server that was measured before
still starts with nothing of the new run in its cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import distribution
from pathlib import Path

LENGTHS = (45, 64, 128, 256)  # tokens; mixed in turn
PREFIX_LENGTH = 512
CHARACTERS_PER_TOKEN = 4.4  # of English legal text, for servers that can't count
FILLER = " a"  # one token in about every vocabulary
STRIDE = 97  # words from the start of one prompt to the next one's; prime, so that all offsets come up
ENDINGS = ("In short, this section says that", "The most important word above is", "A lawyer would ask whether")

CountTokens = Callable[[str], Awaitable[int]]


async def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without asking anybody."""
    return round(len(text) / CHARACTERS_PER_TOKEN)


def licence_text() -> str:
    """This project's licence, from the repository or from the installed package."""
    file = Path(__file__).resolve().parents[1] / "LICENSE"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return distribution("slipstream").read_text("licenses/LICENSE") or ""


class Prompts:
    """A deterministic source of prompts: the same text, counter, seed and calls give the same prompts."""

    def __init__(self, text: str, count_tokens: CountTokens, seed: int) -> None:
        self._words = text.split()
        self._count = count_tokens
        self._seed = seed
        self._serial = 0

    async def make(self, length: int) -> str:
        """A new prompt of `length` tokens: whole words, then fillers up to the exact count."""
        head = f"{self._seed}/{self._serial}:"
        start = self._serial * STRIDE % len(self._words)
        self._serial += 1
        words = self._words[start:] + self._words[:start]
        prompt = await _longest(head, words * (length // len(words) + 1), length, self._count)
        for _ in range(length - await self._count(prompt)):
            prompt += FILLER
        return prompt

    async def mixed(self, count: int) -> list[str]:
        """`count` new prompts of the LENGTHS in turn."""
        return [await self.make(LENGTHS[i % len(LENGTHS)]) for i in range(count)]

    async def pair(self) -> tuple[str, str]:
        """A new prompt of PREFIX_LENGTH tokens, and the same with another ending.

        The ending begins with a space, a border that byte-pair tokenizers never cross: the shared tokens stay
        the same ones.
        """
        prompt = await self.make(PREFIX_LENGTH)
        return prompt, f"{prompt} {ENDINGS[self._serial % len(ENDINGS)]}"


async def _longest(head: str, words: list[str], length: int, count_tokens: CountTokens) -> str:
    """`head` and as many of the words as fit into `length` tokens; each word is at least one."""
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if await count_tokens(" ".join([head, *words[:middle]])) <= length:
            low = middle
        else:
            high = middle - 1
    return " ".join([head, *words[:low]])
