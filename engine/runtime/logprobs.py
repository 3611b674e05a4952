"""Log-probabilities to report: those of the raw logits, before any processing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.types import TokenLogprob

_ROWS_AT_ONCE = 64

# What to report beside a token: so many of the best ones, or these ids, in this order.
Alternatives = int | tuple[int, ...]


def top_logprobs(raw_logits: Tensor, tokens: Tensor, k: Sequence[Alternatives]) -> list[TokenLogprob]:
    """Log-probability, rank and the k[i] alternatives of tokens[i] under row i.

    raw_logits [n, V] float32, tokens [n] int64 on the same device. Order and rank are those of the logits, ties by
    lowest id; a rank is 1 + the number of tokens before it. -inf stays -inf. One transfer per 64 rows.
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(k), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        found += _top_logprobs(raw_logits[part], tokens[part], k[part])
    return found


def prompt_logprobs(logits: Tensor, next_tokens: Tensor, k: int) -> list[TokenLogprob]:
    """The same for a prompt: logits [m, V] float32 of m positions and the tokens [m] that follow them."""
    return top_logprobs(logits, next_tokens, [k] * len(logits))


def _top_logprobs(logits: Tensor, tokens: Tensor, wanted: Sequence[Alternatives]) -> list[TokenLogprob]:
    vocab_size = logits.shape[1]
    k = [count if isinstance(count, int) else 0 for count in wanted]
    width = min(max(k) + 1, vocab_size)  # one more than asked for, to see a tie at the border
    logprobs = logits.log_softmax(1)
    column = tokens.unsqueeze(1)
    chosen = logits.gather(1, column)
    above = (logits > chosen).sum(1, keepdim=True)
    equal = (logits == chosen).sum(1, keepdim=True)
    values, ids = logits.topk(width, dim=1)
    parts = (column, logprobs.gather(1, column), above, equal, ids, values, logprobs.gather(1, ids))
    rows = torch.cat([part.double() for part in parts], dim=1).tolist()
    found = []
    for row, (count, (token, logprob, higher, ties, *best)) in enumerate(zip(k, rows, strict=True)):
        rank = 1 + int(higher)
        if ties > 1:
            rank += int((logits[row, : int(token)] == chosen[row]).sum())
        top = sorted(zip(best[:width], best[width : 2 * width], best[2 * width :], strict=True), key=_by_value)
        if count < width and count > 0 and top[count - 1][1] == top[count][1]:
            top = _stable_top(logits[row], logprobs[row], count)
        named = wanted[row]
        pairs = (
            tuple((int(id_), lp) for id_, _, lp in top[:count]) if isinstance(named, int) else _of(logprobs[row], named)
        )
        found.append(TokenLogprob(int(token), logprob, rank, pairs))
    return found


def _of(logprobs: Tensor, ids: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """These of one row [V], in their order."""
    return tuple(zip(ids, logprobs[torch.tensor(ids, device=logprobs.device)].tolist(), strict=True))


def _by_value(entry: tuple[float, float, float]) -> tuple[float, float]:
    token, value, _ = entry
    return -value, token


def _stable_top(logits: Tensor, logprobs: Tensor, count: int) -> list[tuple[float, float, float]]:
    """(id, logit, log-probability) of the best of one row [V] where tied tokens compete for the last place."""
    values, ids = logits.sort(descending=True, stable=True)
    ids = ids[:count]
    return list(zip(ids.tolist(), values[:count].tolist(), logprobs[ids].tolist(), strict=True))
