"""Which tokens of an answer are hidden in training. Prompts never are."""

from __future__ import annotations

import torch


def uniform(answers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One noise level t ~ U(0, 1) per sequence; each answer token is hidden with probability t (LLaDA, section 2.2).

    answers [B, L] bool: the tokens that may be hidden -> [B, L] bool.
    """
    levels = torch.rand(answers.shape[0], 1, generator=generator)
    return answers & (torch.rand(answers.shape, generator=generator) < levels)


def by_block(answers: torch.Tensor, block: int, generator: torch.Generator) -> torch.Tensor:
    """One noise level per block of `block` columns (Fast-dLLM v2, section 3). [B, L] bool -> [B, L] bool."""
    batch, length = answers.shape
    levels = torch.rand(batch, -(-length // block), generator=generator).repeat_interleave(block, 1)[:, :length]
    return answers & (torch.rand(answers.shape, generator=generator) < levels)


def from_the_left(answers: torch.Tensor, block: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The places that decoding by blocks meets: a random block of each answer is open, what is behind it is hidden.

    Blocks of `block` tokens are counted from each answer's first token. Returns (open, behind), both [B, L] bool.
    """
    place = (answers.long().cumsum(1) - 1) // block
    count = (answers.sum(1, keepdim=True) + block - 1) // block
    chosen = (torch.rand(answers.shape[0], 1, generator=generator) * count).long()
    return answers & (place == chosen), answers & (place > chosen)


def complementary(hidden: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """[2 B, L] bool: the hidden tokens, then in their place the others of `among`. Every token is hidden once."""
    return torch.cat((hidden, among & ~hidden))
