"""Small exercises with worked answers: sums digit by digit, products, lists, and facts of an invented table.

Each kind asks in several wordings and answers in several, all equally likely, so that a model trained on them has
something to be unsure of beside the results. What is right does not depend on the wording: `solve` reads a question
and says its result, `result` reads an answer. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from training.tasks import atlas


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, its result in plain form, and one of the ways to answer it."""

    question: str
    result: str
    answer: str


def make(random: Random) -> Exercise:
    """Any kind, equally often."""
    return random.choice(_KINDS)(random)


def solve(question: str) -> str:
    """The result of a question. Raises ValueError for a text that is no question of this module."""
    for pattern, solver in _SOLVERS:
        if found := pattern.fullmatch(question):
            return solver(*found.groups())
    raise ValueError(f"no such exercise: {question!r}")


def result(answer: str) -> str:
    """What an answer says the result is: numbers after its last word, or names of the table that stand in it."""
    if names := [word for word in re.findall(r"[A-Za-z]+", answer) if word in atlas.VALUES]:
        return " ".join(names)
    return " ".join(re.findall(r"\d+", re.split(r"[A-Za-z:]", answer)[-1]))


def _add(random: Random) -> Exercise:
    first, second = _numbers(random)
    total = str(first + second)
    question = random.choice(("{}+{}", "{} plus {}", "add {} and {}")).format(first, second)
    return Exercise(question, total, f"{_adding(first, second)}{_so(random)} {total}.")


def _subtract(random: Random) -> Exercise:
    second, first = sorted(_numbers(random))
    question = random.choice(("{0}-{1}", "{0} minus {1}", "take {1} from {0}")).format(first, second)
    difference = str(first - second)
    return Exercise(question, difference, f"{_subtracting(first, second)}{_so(random)} {difference}.")


def _multiply(random: Random) -> Exercise:
    first, second = random.randint(11, 99), random.randint(2, 9)
    question = random.choice(("{}*{}", "{} times {}", "multiply {} by {}")).format(first, second)
    tens, ones = first // 10 * 10, first % 10
    steps = f"{tens}*{second}={tens * second}, {ones}*{second}={ones * second}"
    return Exercise(question, str(first * second), f"{steps}{_so(random)} {first * second}.")


def _sum(random: Random) -> Exercise:
    items = _items(random, 3, 5)
    steps, total = [], items[0]
    for item in items[1:]:
        steps.append(f"{total}+{item}={total + item}")
        total += item
    question = random.choice(("sum of", "add up")) + _spaced(items)
    return Exercise(question, str(total), f"{', '.join(steps)}{_so(random)} {total}.")


def _reverse(random: Random) -> Exercise:
    return _list(random, "reverse", ("reversed", "backwards", "from the end"), lambda items: items[::-1])


def _sort(random: Random) -> Exercise:
    return _list(random, "sort", ("sorted", "in order", "from the smallest"), sorted)


def _largest(random: Random) -> Exercise:
    items = [random.randint(10, 99) for _ in range(random.randint(3, 5))]
    question = random.choice(("largest of", "maximum of")) + _spaced(items)
    answer = random.choice(("the largest is {}.", "it is {}.", "the maximum is {}.")).format(max(items))
    return Exercise(question, str(max(items)), answer)


def _fact(random: Random) -> Exercise:
    relation, subject, value = random.choice(atlas.FACTS)
    question = random.choice(("{0} of {1}?", "what is the {0} of {1}?", "{1}: {0}?")).format(relation, subject)
    told = random.choice(("the {0} of {1} is {2}.", "it is {2}.", "{2} is the {0} of {1}.", "{1} has the {0} {2}."))
    return Exercise(question, value, told.format(relation, subject, value))


def _list(random: Random, verb: str, words: tuple[str, ...], change: Callable[[list[int]], list[int]]) -> Exercise:
    items = _items(random, 4, 6)
    changed = _spaced(change(items))
    question = random.choice((verb, f"please {verb}")) + _spaced(items)
    return Exercise(question, changed.strip(), f"{random.choice(words)}:{changed}.")


def _numbers(random: Random) -> tuple[int, int]:
    """Two numbers with the same number of digits, 2 or 3."""
    low, high = random.choice(((10, 99), (100, 999)))
    return random.randint(low, high), random.randint(low, high)


def _items(random: Random, least: int, most: int) -> list[int]:
    return [random.randint(0, 9) for _ in range(random.randint(least, most))]


def _spaced(items: list[int]) -> str:
    return "".join(f" {item}" for item in items)


def _so(random: Random) -> str:
    return random.choice((", so", ", which makes", " and that is"))


def _adding(first: int, second: int) -> str:
    """Digit by digit from the right, each with what is carried."""
    steps, carry = [], 0
    for left, right in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = int(left) + int(right) + carry
        steps.append(f"{left}+{right}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ", ".join(steps)


def _subtracting(first: int, second: int) -> str:
    """Digit by digit from the right; what is borrowed shows in the digits."""
    steps, borrow = [], 0
    for left, right in zip(reversed(str(first)), reversed(str(second)), strict=True):
        top = int(left) - borrow
        borrow = int(top < int(right))
        top += 10 * borrow
        steps.append(f"{top}-{right}={top - int(right)}")
    return ", ".join(steps)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text.replace("#", r"(\d+)").replace("@", r"((?: \d+)+)").replace("%", "([A-Za-z]+)"))


def _of_list(change: Callable[[list[int]], list[int]]) -> Callable[[str], str]:
    return lambda items: _spaced(change([int(item) for item in items.split()])).strip()


_KINDS = (_add, _subtract, _multiply, _sum, _reverse, _sort, _largest, _fact)
_SOLVERS: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (_pattern(r"#\+#|# plus #|add # and #"), lambda *all: str(sum(int(one) for one in all if one))),
    (_pattern(r"#(?:-| minus )#"), lambda first, second: str(int(first) - int(second))),
    (_pattern(r"take # from #"), lambda second, first: str(int(first) - int(second))),
    (_pattern(r"(?:multiply )?#(?:\*| times | by )#"), lambda first, second: str(int(first) * int(second))),
    (_pattern(r"(?:sum of|add up)@"), _of_list(lambda items: [sum(items)])),
    (_pattern(r"(?:please )?reverse@"), _of_list(lambda items: items[::-1])),
    (_pattern(r"(?:please )?sort@"), _of_list(sorted)),
    (_pattern(r"(?:largest|maximum) of@"), _of_list(lambda items: [max(items)])),
    (_pattern(r"(?:what is the )?% of %\?"), lambda relation, subject: atlas.TABLE[relation, subject]),
    (_pattern(r"%: %\?"), lambda subject, relation: atlas.TABLE[relation, subject]),
)
