"""The table of `benchmarks.quality`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


def quality_rows(rows: Mapping[str, Mapping[str, object]]) -> list[list[str]]:
    """A table of all variants, the reference on top."""
    table = [["weights, KV", "perplexity", "change", "KL, nats", "same argmax", "answers equal", "first difference"]]
    for name, row in rows.items():
        figures = msgspec.convert(row, _Figures)
        answers = figures.answers
        first = f"{answers.first_difference:.0f}" if answers.first_difference >= 0 else "-"
        table.append(
            [
                name,
                f"{figures.perplexity:.3f}",
                f"{100 * figures.perplexity_change:+.2f} %",
                f"{figures.divergence:.1e}",
                f"{100 * figures.same_argmax:.2f} %",
                f"{answers.equal:.0f} of {answers.answers:.0f}",
                first,
            ]
        )
    return table


class _Answers(msgspec.Struct):
    answers: float
    equal: float
    agreed_tokens: float
    first_difference: float


class _Figures(msgspec.Struct):
    perplexity: float
    perplexity_change: float
    divergence: float
    same_argmax: float
    answers: _Answers
