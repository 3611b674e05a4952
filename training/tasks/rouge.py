"""ROUGE (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004): F1 of shared words, without stemming."""

from __future__ import annotations

import re
from collections import Counter


def rouge_n(answer: str, reference: str, n: int) -> float:
    """F1 of runs of n words, each counted as often as it stands in both."""
    ours, theirs = _runs(words(answer), n), _runs(words(reference), n)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    ours, theirs = words(answer), words(reference)
    return _f1(_common(ours, theirs), len(ours), len(theirs))


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def _runs(found: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))


def _common(ours: list[str], theirs: list[str]) -> int:
    """Length of the longest common subsequence, row by row."""
    above = [0] * (len(theirs) + 1)
    for word in ours:
        row = [0]
        for place, other in enumerate(theirs):
            row.append(above[place] + 1 if word == other else max(row[place], above[place + 1]))
        above = row
    return above[-1]


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0
