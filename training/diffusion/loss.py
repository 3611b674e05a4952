"""The objective: cross entropy of hidden tokens, averaged over them, from two complementary copies of every sample.

Not weighted by 1/t: plain means are steadier in small batches. <|endoftext|> behind an answer counts for a part only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from training.diffusion import masking
from training.diffusion.batches import Batch
from training.diffusion.network import Network


@dataclass(frozen=True, slots=True)
class Objective:
    """mask_id and end_id of the tokenizer; `block` in tokens; `padding`: weight of <|endoftext|>.

    `leftward`: share of full-attention samples whose masks are those of decoding by blocks, not uniform ones; `behind`:
    weight of their tokens that are behind the open block, which nobody can know yet.
    """

    mask_id: int
    end_id: int
    block: int = 32
    padding: float = 0.1
    leftward: float = 0.5
    behind: float = 1.0


@dataclass(frozen=True, slots=True)
class Scored:
    """loss: the weighted mean. Of tokens that are not padding: summed cross entropy, those right, their count."""

    loss: torch.Tensor
    entropy: float
    right: int
    count: int


def full(network: Network, batch: Batch, objective: Objective, generator: torch.Generator) -> Scored:
    """Full attention: every row sees its whole canvas."""
    hidden, behind = canvas_masks(batch, objective, generator)
    ids = batch.ids.repeat(2, 1)
    seen = torch.arange(ids.shape[1]) < batch.lengths.unsqueeze(1)
    mask = seen.repeat(2, 1)[:, None, None, :]
    states, _ = network(ids.masked_fill(hidden, objective.mask_id), 0, mask)
    weights = torch.where(behind[hidden], objective.behind, 1.0)
    return _score(network, states[hidden], ids[hidden], weights, objective)


def block_causal(network: Network, batch: Batch, objective: Objective, generator: torch.Generator) -> Scored:
    """Noisy blocks over clean ones; blocks that are nothing but prompt in all samples have no noisy copy."""
    start = batch.prompt // objective.block * objective.block
    drawn = masking.by_block(batch.answers, objective.block, generator)
    hidden = masking.complementary(drawn, batch.answers)[:, start:]
    ids = batch.ids[:, start:].repeat(2, 1)
    states = network.denoise(batch.ids, ids.masked_fill(hidden, objective.mask_id), objective.block)
    return _score(network, states[hidden], ids[hidden], torch.ones(()), objective)


def canvas_masks(batch: Batch, objective: Objective, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What is hidden in the two copies, each sample's by one law or the other, and what of it is behind an open block.

    Both [2 B, L] bool.
    """
    free = masking.uniform(batch.answers, generator)
    inside, behind = masking.from_the_left(batch.answers, objective.block, generator)
    noisy = masking.uniform(inside, generator)
    by_blocks = torch.rand(len(free), 1, generator=generator) < objective.leftward
    first = torch.where(by_blocks, noisy | behind, free)
    second = torch.where(by_blocks, (inside & ~noisy) | behind, batch.answers & ~free)
    return torch.cat((first, second)), (behind & by_blocks).repeat(2, 1)


def _score(
    network: Network, states: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, objective: Objective
) -> Scored:
    logits = network.logits(states).float()
    each = functional.cross_entropy(logits, labels, reduction="none")
    padding = labels == objective.end_id
    weights = weights * torch.where(padding, objective.padding, 1.0)
    right = int((logits.argmax(-1) == labels)[~padding].sum())
    loss = (each * weights).sum() / weights.sum().clamp(min=1e-6)
    return Scored(loss, float(each.detach()[~padding].sum()), right, int((~padding).sum()))
