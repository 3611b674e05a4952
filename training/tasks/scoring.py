"""What an answer is worth, by the kind of its task: a number, a text, tests that pass, or a summary."""

from __future__ import annotations

import re

from training.tasks import worksheet
from training.tasks.rouge import rouge_l, rouge_n
from training.tasks.sandbox import passes
from training.tasks.task import Item, Score

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_FENCE = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def number(answer: str, item: Item) -> float:
    """1 where the last number of the answer is the last one of the reference, as GSM8K is scored."""
    found, wanted = _last_number(answer), _last_number(item.reference)
    return float(found is not None and found == wanted)


def exact(answer: str, item: Item) -> float:
    """1 where the answer is the reference, but for case, spaces, and quotation marks around it."""
    return float(_plain(answer) == _plain(item.reference))


def contains(answer: str, item: Item) -> float:
    """1 where the reference stands somewhere in the answer as whole words, compared as `exact` does."""
    return float(f" {_plain(item.reference)} " in f" {_plain(answer)} ")


def code(answer: str, item: Item) -> float:
    """1 where the tests pass behind the answer's code: its first fenced block, or all of it.

    Runs what a model wrote: see `sandbox` for what that does and does not protect from.
    """
    block = _FENCE.search(answer)
    text = answer if block is None else block.group(1)
    return float(passes(f"{text}\n\n{item.tests}\n"))


def rouge2(answer: str, item: Item) -> float:
    """F1 of word pairs."""
    return rouge_n(answer, item.reference, 2)


def rougel(answer: str, item: Item) -> float:
    """F1 of the longest common subsequence of words."""
    return rouge_l(answer, item.reference)


KINDS: dict[str, Score] = {
    "number": number,
    "exact": exact,
    "contains": contains,
    "code": code,
    "rouge2": rouge2,
    "rougeL": rougel,
    "worksheet": worksheet.score,
}


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("\"'`").lower().split())
