"""The greedy requests that all draft benchmarks ask: held-out questions as first chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from benchmarks import serve_datasets
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import Request, SamplingParams, SpeculationParams

SETS = ("gsm8k", "humaneval", "mtbench")


def questions(source: str, count: int) -> list[str]:
    """The first `count` texts of a data set or of a file. Raises BenchmarkError where there is none."""
    texts = [str(entry.content) for entry in serve_datasets.read(source) if isinstance(entry.content, str)]
    return texts[:count]


def mixed(sources: Sequence[str], count: int) -> list[tuple[str, str]]:
    """`count` (name, text) pairs, taken from the sources in turn."""
    columns = [[(f"{source}-{i}", text) for i, text in enumerate(questions(source, count))] for source in sources]
    longest = max(map(len, columns), default=0)
    in_turn = (column[i] for i in range(longest) for column in columns if i < len(column))
    return list(islice(in_turn, count))


def greedy(
    tokenizer: Tokenizer,
    named: Sequence[tuple[str, str]],
    max_tokens: int,
    *,
    logprobs: bool = False,
    drafting: bool = True,
) -> list[Request]:
    """Requests through the model's chat template, which end where the model ends them."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=2 if logprobs else None)
    wish = SpeculationParams(enabled=drafting)
    return [
        Request(
            name,
            tuple(tokenizer.encode_chat([{"role": "user", "content": text}])),
            sampling,
            eos_ids=tuple(tokenizer.eos_ids),
            speculation=wish,
        )
        for name, text in named
    ]
