"""Sheets as training batches: every step's batch is a function of the seed and the step, so nothing need be stored."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer

from training.diffusion.vocabulary import END, TURN_END, chat, token
from training.tasks import worksheet
from training.tasks.task import held_out

POOL = 8  # batches whose samples are drawn together and sorted by length, so that little is padded


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of a prompt, in the chat template, and of its answer with the end of the turn."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """ids [B, L] int64; answers [B, L] bool: what may be hidden; lengths [B] of what is there; prompt: the shortest."""

    ids: torch.Tensor
    answers: torch.Tensor
    lengths: torch.Tensor
    prompt: int


class Sheets:
    """Samples of the task `worksheet` in ids, of its training split or of what is held out."""

    def __init__(self, tokenizer: Tokenizer, canvas: int = 256, unit: int = 32) -> None:
        self._tokenizer = tokenizer
        self.canvas, self.unit = canvas, unit  # tokens: the longest canvas, and what canvases are multiples of
        self.end = token(tokenizer, END)
        self.turn_end = token(tokenizer, TURN_END)

    def samples(self, random: Random, count: int, *, test: bool = False) -> list[Sample]:
        """`count` samples of one split; answers that no canvas holds are left out."""
        found: list[Sample] = []
        while len(found) < count:
            item = worksheet.sample(random)
            if held_out(item) == test:
                sample = self.encode(item.prompt, item.reference)
                if len(sample.answer) <= self.canvas:
                    found.append(sample)
        return found

    def encode(self, prompt: str, answer: str = "") -> Sample:
        said = self._tokenizer.encode(answer, add_special_tokens=False).ids
        return Sample(self._tokenizer.encode(chat(prompt), add_special_tokens=False).ids, [*said, self.turn_end])

    def text(self, ids: list[int]) -> str:
        """What an answer says, up to the end of the turn."""
        ends = [place for place, token in enumerate(ids) if token in (self.turn_end, self.end)]
        return self._tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=False)

    def step(self, seed: int, step: int, sequences: int) -> list[Sample]:
        """The samples of one training step; 8 steps share a pool sorted by length."""
        random = Random(f"{seed}/{step // POOL}")
        pool = sorted(self.samples(random, POOL * sequences), key=lambda one: len(one.prompt) + len(one.answer))
        order = list(range(POOL))
        random.shuffle(order)
        first = order[step % POOL] * sequences
        return pool[first : first + sequences]

    def on_canvas(self, samples: list[Sample], random: Random) -> Batch:
        """For full attention: answers on canvases filled up with <|endoftext|>, as short as can be or all as long."""
        least = [-(-len(sample.answer) // self.unit) for sample in samples]
        longer = random.randint(max(least), self.canvas // self.unit) if random.random() < 0.25 else 0
        rooms = [max(units, longer) * self.unit for units in least]
        return self._batch(list(zip(samples, rooms, strict=True)), 1)

    def in_blocks(self, samples: list[Sample], block: int) -> Batch:
        """For block-causal attention: filled up with <|endoftext|> to a whole block, counted from position 0."""
        rows = []
        for sample in samples:
            whole = len(sample.prompt) + len(sample.answer)
            rows.append((sample, len(sample.answer) + -whole % block))
        return self._batch(rows, block)

    def _batch(self, rows: list[tuple[Sample, int]], multiple: int) -> Batch:
        lengths = torch.tensor([len(sample.prompt) + room for sample, room in rows])
        width = -(-int(lengths.max()) // multiple) * multiple
        ids = torch.full((len(rows), width), self.end)
        for row, (sample, _) in enumerate(rows):
            tokens = sample.prompt + sample.answer
            ids[row, : len(tokens)] = torch.tensor(tokens)
        prompts = torch.tensor([len(sample.prompt) for sample, _ in rows])
        at = torch.arange(width)
        answers = (at >= prompts.unsqueeze(1)) & (at < lengths.unsqueeze(1))
        return Batch(ids, answers, lengths, int(prompts.min()))


def corpus(seed: int, count: int) -> list[str]:
    """Texts to train a tokenizer on, of the training split."""
    random = Random(seed)
    texts = (
        chat(item.prompt) + item.reference
        for item in iter(lambda: worksheet.sample(random), None)
        if not held_out(item)
    )
    return list(islice(texts, count))
