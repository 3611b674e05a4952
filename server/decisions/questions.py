"""Questions with a closed set of answers: how a model is asked, and what its probabilities come to.

Each option has a label that is one token for the usual tokenizers: a letter, a digit, or yes and no. The model reads
the options with their labels, and the law of the first token of its reply says how likely each of them is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase, digits

MAX_QUESTIONS = 400
MAX_CHOICES = len(ascii_uppercase)
MAX_LEVELS = len(digits)

_LETTER = ("the letter of the option that fits best", "a letter")
_NUMBER = ("the number of the level that fits best", "a number")
_YES_NO = ("yes or no", "yes or no")


@dataclass(frozen=True, slots=True)
class Option:
    label: str
    name: str = ""
    text: str = ""  # what it means, if somebody has said so

    def line(self) -> str:
        words = ": ".join(part for part in (self.name, self.text) if part)
        return f"{self.label}. {words}" if words else self.label


@dataclass(frozen=True, slots=True)
class Question:
    """`text` is asked, then come the options. `where` is the client's name for the question, in errors.

    `reply` says what an answer is, in full and in short.
    """

    where: str
    text: str
    options: tuple[Option, ...]
    reply: tuple[str, str]
    listed: bool = True  # are the options shown? yes and no need not be

    def prompt(self) -> str:
        return "\n".join((*self._lines("Question"), f"Reply with {self.reply[0]}, and nothing else."))

    def numbered(self, number: int) -> str:
        """Where several are asked at once, which is said behind the last of them."""
        return "\n".join(self._lines(f"Question {number} ({self.reply[1]})"))

    def _lines(self, head: str) -> list[str]:
        lines = [f"{head}: {self.text}" if self.text else f"{head}:"]
        return lines + [option.line() for option in self.options] if self.listed else lines


def choice(where: str, text: str, options: Sequence[tuple[str, str]]) -> Question:
    """`options`: names and what they mean."""
    labelled = zip(ascii_uppercase, options, strict=False)
    return Question(where, text, tuple(Option(label, *option) for label, option in labelled), _LETTER)


def score(where: str, text: str, levels: Sequence[tuple[str, str]]) -> Question:
    """Ordered levels; the label of a level is its value."""
    labelled = zip(digits, levels, strict=False)
    return Question(where, text, tuple(Option(label, *level) for label, level in labelled), _NUMBER)


def yes_or_no(where: str, text: str, yes: str = "", no: str = "") -> Question:
    return Question(where, text, (Option("yes", yes), Option("no", no)), _YES_NO, listed=bool(yes or no))


@dataclass(frozen=True, slots=True)
class Weighed:
    """What came of a question. `probabilities` are of the options in their order, and add up to 1."""

    probabilities: tuple[float, ...]
    mass: float  # that the model's law gives to the labels together: little where it would rather say something else
    best_is_label: bool  # is the likeliest token one of them?

    @property
    def best(self) -> int:
        """The likeliest option, the first on ties."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    @property
    def expected(self) -> float:
        """The mean of the options' places, from 0."""
        return math.fsum(place * share for place, share in enumerate(self.probabilities))

    @property
    def confidence(self) -> float:
        """How far the best option is above an even spread, from 0 to 1: (p - 1/n) / (1 - 1/n)."""
        count = len(self.probabilities)
        if count < 2:
            return 1.0
        return min(1.0, max(0.0, (self.probabilities[self.best] * count - 1) / (count - 1)))


def weigh(groups: Sequence[Sequence[int]], logprobs: Sequence[float], best: int) -> Weighed:
    """`groups`: the tokens that count for each option; `logprobs` are of all of them, one after another.

    `best` is the likeliest token of the whole vocabulary.
    """
    top = max(logprobs)
    values = iter(logprobs)
    if top == -math.inf:  # none of the labels can come: nothing is known
        return Weighed((1 / len(groups),) * len(groups), 0.0, False)
    weights = [math.fsum(math.exp(next(values) - top) for _ in group) for group in groups]
    total = math.fsum(weights)
    mass = min(1.0, math.fsum(map(math.exp, logprobs)))
    return Weighed(tuple(weight / total for weight in weights), mass, any(best in group for group in groups))
