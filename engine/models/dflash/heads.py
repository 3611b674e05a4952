"""What stands behind the draft's layers: the choice of each token in the light of the one before it, and confidence."""

from __future__ import annotations

import torch
from torch import nn

from engine.models.dflash.decoder import Tensors, merged, parameter
from engine.models.dflash.spec import DFlashSpec


class MarkovHead(nn.Module):
    """DSpark: logits += W2 W1[previous] (low rank)."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.before = parameter(tensors["markov_head.markov_w1.weight"])  # [vocabulary, rank]
        self.after = merged(tensors, ["markov_head.markov_w2"])  # rank -> draft vocabulary

    def forward(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return logits + self.after(self.before[previous]).float()


class PathSelector(nn.Module):
    """DFlash2: among the best tokens b of a slot, logit(b) + <A[previous] * P h, B[b]> decides; others are out."""

    def __init__(self, spec: DFlashSpec, tensors: Tensors) -> None:
        super().__init__()
        self.top_k = spec.selector_top_k
        self.before = parameter(tensors["candidate_selector.predecessor_codebook"])  # [vocabulary, rank]
        self.after = parameter(tensors["candidate_selector.successor_codebook"])
        self.projection = merged(tensors, ["candidate_selector.hidden_projection"])

    def forward(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        best, tokens = logits.topk(min(self.top_k, logits.shape[1]), dim=1)
        from_ = self.before[previous] * self.projection(hidden)
        scores = best + (self.after[tokens] @ from_.unsqueeze(-1)).squeeze(-1).float()
        return torch.full_like(logits, float("-inf")).scatter_(1, tokens, scores)


class ConfidenceHead(nn.Module):
    """DSpark: the logit of the chance that a drafted token stands, from its hidden state and the token before it."""

    def __init__(self, spec: DFlashSpec, tensors: Tensors) -> None:
        super().__init__()
        self.projection = merged(tensors, ["confidence_head.proj"])
        self.before = parameter(tensors["markov_head.markov_w1.weight"]) if spec.confidence_with_markov else None

    def forward(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        if self.before is not None:
            hidden = torch.cat((hidden, self.before[previous]), dim=-1)
        out: torch.Tensor = self.projection(hidden)
        return out.squeeze(-1).float()
