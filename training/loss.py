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
    """sum_i w_i * CE(hard * onehot(label) + (1 - hard) * teacher, softmax(x_i @ table.T)).

    Gradients are made in the forward pass, chunk by chunk: p - t needs the logits, which are too large to keep. Of the
    table, only the last `learnt` columns get one.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        table: torch.Tensor,
        labels: Labels,
        weights: torch.Tensor,
        hard: float,
        learnt: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad = torch.empty_like(x, dtype=torch.float32)
        grad_table = torch.zeros(len(table), learnt, device=x.device)
        total = torch.zeros((), device=x.device)
        best = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            low = x[part].to(table.dtype)
            logits = (low @ table.T).float()
            best[part] = _argmax(logits)
            law = _law(labels, part, hard)
            log_probs = torch.log_softmax(logits, dim=1)
            total -= ((law * log_probs).sum(1) * weights[part]).sum()
            delta = log_probs.exp_().mul_(law.sum(1, keepdim=True)).sub_(law).mul_(weights[part].unsqueeze(1))
            delta = delta.to(table.dtype)
            grad[part] = delta @ table
            if learnt:
                grad_table += delta.T @ low[:, -learnt:]
        ctx.save_for_backward(grad, grad_table)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, learnt = ctx.saved_tensors  # type: ignore[attr-defined]
        frozen = learnt.new_zeros(len(learnt), grad.shape[1] - learnt.shape[1])
        table = torch.cat((frozen, learnt * grads[0]), dim=1) if learnt.shape[1] else None
        return grad * grads[0], table, None, None, None, None


def _law(labels: Labels, part: slice, hard: float) -> torch.Tensor:
    """What these rows should say, [rows, draft vocabulary]; without the label's share where it can't be drafted."""
    law = torch.softmax(labels.teacher[labels.teacher_rows[part]], dim=1).mul_(1.0 - hard)
    ids = labels.ids[part]
    law[torch.arange(len(ids), device=ids.device), ids.clamp(min=0)] += hard * (ids >= 0)
    return law


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
    x, table, learnt = hidden, head, 0
    if markov is not None and w2 is not None:
        x, table, learnt = torch.cat((hidden, markov), dim=1), torch.cat((head, w2.to(head.dtype)), dim=1), w2.shape[1]
    total, best = _MixedCrossEntropy.apply(x, table, labels, weights, hard, learnt)
    return total, best
