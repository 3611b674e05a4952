"""Narrow tasks from templates, on which even a very small model scores: a few worked examples, then one to do.

All prompts of a task begin with the same examples, so that a prefix cache holds most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from training.tasks.task import Item

_WORDS = """\
Anna Ben Clara David Ella Farid Grace Hugo Iris Jonas Kira Liam Maya Noah Olga Pablo Quinn Rosa Sam Tara
Paris Rome Berlin Madrid Vienna Oslo Lisbon Prague Dublin Athens Warsaw Helsinki
teacher doctor baker painter farmer lawyer nurse pilot driver waiter
apples bread cheese milk rice eggs pears honey salt tea butter beans
chess tennis reading cooking swimming singing dancing hiking
red blue green yellow white black brown orange
"""
NAMES, CITIES, JOBS, GOODS, HOBBIES, COLOURS = (tuple(line.split()) for line in _WORDS.splitlines())

Pair = tuple[str, str]  # a question and its answer


@dataclass(frozen=True, slots=True)
class Template:
    """How questions are made, how many are shown with their answers first, and how answers are scored."""

    make: Callable[[Random], Pair]
    kind: str
    shots: int = 3
    max_tokens: int = 72

    def items(self, seed: int) -> Iterator[Item]:
        """Items without end."""
        shown = Random(7)
        shots = "".join(
            f"{question}\n{answer}\n\n" for question, answer in (self.make(shown) for _ in range(self.shots))
        )
        random = Random(seed)
        while True:
            question, answer = self.make(random)
            yield Item(f"{shots}{question}\n", answer)


def extract(random: Random) -> Pair:
    """A sentence about a person -> a form."""
    name, city, job, hobby = _person(random)
    age = random.randint(20, 70)
    return (
        f"Text: {name} is {age} years old, lives in {city}, works as a {job} and likes {hobby}.",
        f"Name: {name}\nAge: {age}\nCity: {city}\nJob: {job}\nHobby: {hobby}",
    )


def fill(random: Random) -> Pair:
    """Facts -> a text of fixed sentences."""
    name, city, job, hobby = _person(random)
    age = random.randint(20, 70)
    return (
        f"Facts: {name}, {age}, {city}, {job}, {hobby}",
        f"Text: My name is {name}. I am {age} years old. I live in {city} and I work as a {job}. "
        f"In my free time I like {hobby}.",
    )


def summary(random: Random) -> Pair:
    """Four sentences -> one."""
    name, city, job, hobby = _person(random)
    first, second = random.sample(GOODS, 2)
    return (
        f"Story: {name} is a {job} who lives in a {random.choice(COLOURS)} house in {city}. Every morning, {name} "
        f"walks to the market. There {name} buys {first} and {second} for breakfast. "
        f"In the evening, {name} likes {hobby}.",
        f"Summary: {name} is a {job} in {city} who buys {first} and {second} at the market every morning "
        f"and likes {hobby} in the evening.",
    )


def sums(random: Random) -> Pair:
    """A word problem with one addition; the last number counts."""
    name, goods = random.choice(NAMES), random.choice(GOODS)
    first, second = random.randint(2, 12), random.randint(2, 9)
    total = first + second
    return (
        f"Question: {name} has {first} {goods} and buys {second} more. How many {goods} does {name} have now?",
        f"Answer: {name} has {first} {goods}. {name} buys {second} more {goods}. So {name} has {first} + {second} = "
        f"{total} {goods}. The answer is {total}.",
    )


def _person(random: Random) -> tuple[str, str, str, str]:
    return random.choice(NAMES), random.choice(CITIES), random.choice(JOBS), random.choice(HOBBIES)


TEMPLATES = {
    "extract": Template(extract, "exact"),
    "fill": Template(fill, "exact"),
    "summary": Template(summary, "rouge2"),
    "sums": Template(sums, "number"),
}
