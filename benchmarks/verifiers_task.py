"""What is asked: the held-out questions of one task with a score, and questions of data sets without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.drafts_prompts import mixed
from benchmarks.stream import BenchmarkError
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SamplingParams
from training.tasks import loading as tasks

GENERAL = "general"
SEED = 20_000  # of the first answer


@dataclass(frozen=True, slots=True)
class Question:
    """`score` takes an answer to a number in [0, 1], where the task says."""

    name: str
    text: str
    score: Callable[[str], float] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Group:
    """Questions that are told together. An answer ends before any of `stop`, and at `max_tokens` where it is given.

    `chat`: the texts are first messages; otherwise they are what the model is to go on with.
    """

    name: str
    questions: tuple[Question, ...]
    chat: bool = True
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None

    @property
    def scored(self) -> bool:
        return any(one.score is not None for one in self.questions)


def task(source: str, count: int, kind: str = "", max_tokens: int = 256) -> Group:
    """The first `count` held-out questions of a built-in task or of a file, whose answers get so many tokens at most.

    `kind`: how answers are scored, where it is not the task's own way. Raises ConfigError.
    """
    found = tasks.load(source, kind, max_tokens=max_tokens)
    items = enumerate(found.items("test", count))
    asked = tuple(Question(f"{found.name}-{i}", item.prompt, partial(found.score, item=item)) for i, item in items)
    return Group(found.name, asked, found.chat, found.stop, found.max_tokens)


def general(sources: Sequence[str], count: int) -> Group:
    """`count` questions, of the data sets in turn. Raises BenchmarkError."""
    found = tuple(Question(name, text) for name, text in mixed(sources, count))
    if not found:
        raise BenchmarkError(f"--sources {' '.join(sources)}: no questions")
    return Group(GENERAL, found)


def requests(group: Group, tokenizer: Tokenizer, sampling: SamplingParams, samples: int, label: str) -> list[Request]:
    """`samples` requests for every question in turn; the seed of each is its own, and the same under all labels."""
    found = []
    for number, one in enumerate(group.questions):
        chat = [{"role": "user", "content": one.text}]
        ids = tuple(tokenizer.encode_chat(chat) if group.chat else tokenizer.encode(one.text))
        for take in range(samples):
            seeded = replace(sampling, seed=SEED + number * samples + take)
            name = f"{label}/{one.name}/{take}"
            found.append(Request(name, ids, seeded, eos_ids=tuple(tokenizer.eos_ids)))
    return found


@dataclass(frozen=True, slots=True)
class Ending:
    """Where an answer ends: at its stop strings, which are looked for here as the front process does for clients."""

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()

    def reached(self, tokens: Sequence[int]) -> bool:
        """Is a stop string in it?"""
        return bool(self.stop) and any(stop in self.tokenizer.decode(tokens) for stop in self.stop)

    def length(self, tokens: Sequence[int]) -> int:
        """Tokens up to the one that completes a stop string."""
        if not self.reached(tokens):
            return len(tokens)
        return next(count for count in range(1, len(tokens) + 1) if self.reached(tokens[:count]))

    def text(self, tokens: Sequence[int]) -> str:
        """What stands before the first stop string."""
        text = self.tokenizer.decode(tokens)
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))]
