"""The task `worksheet`: one to eight small exercises in one message, answered one after another, line by line.

An answer is worth the share of its parts that are right: a part is right where the line with its letter gives the
result that the question has, whatever the wording and the steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from training.tasks import exercises
from training.tasks.task import Item

MOST = 8
LETTERS = "abcdefgh"
_OPENINGS = ("", "", "Please answer:\n", "Solve these:\n", "Questions:\n")
_LINE = re.compile(r"([a-h])\) (.+)")


def sample(random: Random) -> Item:
    """A sheet and the reference answer, worked and worded as by the model's teacher."""
    parts = [exercises.make(random) for _ in range(random.randint(1, MOST))]
    lines = [f"{letter}) {part.question}" for letter, part in zip(LETTERS, parts, strict=False)]
    answers = [f"{letter}) {part.answer}" for letter, part in zip(LETTERS, parts, strict=False)]
    return Item(random.choice(_OPENINGS) + "\n".join(lines), "\n".join(answers))


def items(seed: int) -> Iterator[Item]:
    """Sheets without end."""
    random = Random(seed)
    while True:
        yield sample(random)


def score(answer: str, item: Item) -> float:
    """Share of the parts of the item's prompt that the answer gets right, 0 to 1. A part answered twice is wrong."""
    questions = _lines(item.prompt)
    given = _lines(answer)
    right = 0
    for letter, question in questions.items():
        told = given.get(letter, [])
        right += len(told) == 1 and exercises.result(told[0]) == exercises.solve(question[0])
    return right / len(questions) if questions else 0.0


def _lines(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line.strip()):
            found.setdefault(match[1], []).append(match[2])
    return found
