"""Head and loss in one: the logits of a block never live longer than one chunk of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Labels(NamedTuple):
    """What the rows should say. `ids` [rows] int64 in the draft vocabulary, -1: no such token there, not counted.

    `teacher` [positions, draft vocabulary] are the target's own logits, one row per distinct label; `teacher_rows`
    [rows] says which one is a row's.
    """

    ids: torch.Tensor
    teacher: torch.Tensor
    teacher_rows: torch.Tensor


CHUNK = 1024  # rows of logits at a time


class _MixedCrossEntropy(torch.autograd.Function):
    """sum_i w_i * CE(hard * onehot(label) + (1 - hard) * teacher, softmax(h_i @ head.T + bias_i)).

    Gradients are made in the forward pass, chunk by chunk: p - t needs the logits, which are too large to keep.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, weights, hard, markov, w2):  # type: ignore[no-untyped-def]
        rows = hidden.shape[0]
        grad = torch.empty_like(hidden, dtype=torch.float32)
        grad_markov = None if markov is None else torch.empty_like(markov, dtype=torch.float32)
        grad_w2 = None if w2 is None else torch.zeros_like(w2, dtype=torch.float32)
        losses = torch.empty(rows, device=hidden.device)
        best = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        low = head.dtype
        for start in range(0, rows, CHUNK):
            part = slice(start, start + CHUNK)
            h = hidden[part].to(low)
            logits = h @ head.T
            if markov is not None:
                m = markov[part].to(low)
                logits = logits + m @ w2.T.to(low)
            logits = logits.float()
            best[part] = _argmax(logits)
            logp = torch.log_softmax(logits, dim=1)
            ids = labels.ids[part].clamp(min=0)
            known = (labels.ids[part] >= 0).float()
            target = torch.softmax(labels.teacher[labels.teacher_rows[part]], dim=1).mul_(1.0 - hard)
            target[torch.arange(len(ids), device=ids.device), ids] += hard * known
            mass = target.sum(1, keepdim=True)
            losses[part] = -(target * logp).sum(1)
            delta = logp.exp_().mul_(mass).sub_(target).mul_(weights[part].unsqueeze(1)).to(low)
            grad[part] = (delta @ head).float()
            if markov is not None:
                grad_markov[part] = (delta @ w2.to(low)).float()
                grad_w2 += (delta.T @ m).float()
        ctx.save_for_backward(grad, grad_markov, grad_w2)
        ctx.mark_non_differentiable(best)
        return (losses * weights).sum(), best

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grad, grad_markov, grad_w2 = ctx.saved_tensors
        through = [None if part is None else part * grad_loss for part in (grad, grad_markov, grad_w2)]
        return through[0], None, None, None, None, *through[1:]


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":  # numpy's is vectorised
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def mixed_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: Labels,
    weights: torch.Tensor,
    hard: float,
    markov: torch.Tensor | None = None,
    w2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the rows' losses, and each row's likeliest id [rows].

    hidden [rows, width], head [draft vocabulary, width], weights [rows] float32. `hard` is the share of the label, the
    rest is the target's own law. `markov` [rows, rank] and `w2` [draft vocabulary, rank] add DSpark's bias.
    """
    return _MixedCrossEntropy.apply(hidden, head, labels, weights, hard, markov, w2)  # type: ignore[no-any-return]
