"""One training step of a DFlash draft: blocks at random anchors, labels, weights, loss, acceptance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from training.batches import Batch
from training.loss import Labels, mixed_cross_entropy
from training.network import DraftNetwork
from training.target import TargetParts


@dataclass(frozen=True, slots=True)
class Recipe:
    """`decay` is gamma of the weights exp(-(k - 1) / gamma), k the drafted position; `hard` the label's share of the
    loss, the rest is distilled from the target's logits."""

    decay: float = 4.0
    hard: float = 0.5


class DFlashTask:
    """What the trainer asks of a draft: a loss for a batch, and how many labels in a row it gets right."""

    def __init__(
        self,
        network: DraftNetwork,
        parts: TargetParts,
        vocabulary: torch.Tensor,
        columns: torch.Tensor,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        """`vocabulary` [draft vocabulary]: target ids, rising. `columns`: of the taps, then of the last layer."""
        self.network, self.spec, self.recipe = network, network.spec, recipe
        self.columns = columns
        self._parts, self._device = parts, device
        self._low = torch.bfloat16
        self._embedding = parts.embedding.to(device)
        self._head = parts.head[vocabulary].to(device, self._low)
        self._draft_ids = torch.full((parts.embedding.shape[0],), -1, dtype=torch.int64)
        self._draft_ids[vocabulary] = torch.arange(len(vocabulary))
        self._draft_ids = self._draft_ids.to(device)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean loss, right [blocks, most] bool: the label was likeliest, counted [blocks, most] bool)."""
        width, most, slots = self.spec.hidden_size, self.spec.most, self.spec.block_size
        feature_width = len(self.spec.taps) * width
        inputs = torch.full((*batch.anchors.shape, slots), self.spec.mask_token_id, device=self._device)
        inputs[..., 0] = batch.tokens.gather(1, batch.anchors)
        with torch.autocast(self._device.type, dtype=self._low):
            hidden = self.network(
                batch.states[..., :feature_width],
                functional.embedding(inputs.flatten(1), self._embedding),
                batch.anchors,
            )
        hidden = hidden.unflatten(1, (-1, slots))[:, :, slots - most :][batch.visible]  # [blocks, most, width]
        rows, at = self._label_places(batch)
        inside = at < batch.lengths[rows]
        at = at.clamp(max=batch.tokens.shape[1] - 1)
        labels = batch.tokens[rows, at]
        ids = self._draft_ids[labels]
        counted = inside & (ids >= 0)
        teacher, teacher_rows = self._teacher(batch, rows, at)
        weights = torch.exp(-torch.arange(most, device=self._device) / self.recipe.decay) * counted
        markov = w2 = None
        if self.network.markov_head is not None:
            before = batch.tokens[rows, at - 1]
            markov = self.network.markov_head.markov_w1(before.flatten())
            w2 = self.network.markov_head.markov_w2.weight
        total, best = mixed_cross_entropy(
            hidden.flatten(0, 1), self._head, Labels(ids.flatten(), teacher, teacher_rows.flatten()),
            weights.flatten(), self.recipe.hard, markov, w2,
        )  # fmt: skip
        right = (best.view_as(ids) == ids) & counted
        return total / weights.sum().clamp(min=1.0), right, inside

    @torch.no_grad()
    def _teacher(self, batch: Batch, rows: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's logits of the labels' positions, [distinct, draft vocabulary], and each label's row in them.

        A position's law comes from the hidden state one position before.
        """
        distinct, places = (rows * batch.tokens.shape[1] + at - 1).unique(return_inverse=True)
        last = batch.states.flatten(0, 1)[distinct, len(self.spec.taps) * self.spec.hidden_size :]
        return (self._parts.normed(last).to(self._low) @ self._head.T).float(), places

    def _label_places(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence and position of each label [blocks, most]: the token AT the slot's position, no shift."""
        rows = batch.visible.nonzero()[:, 0].unsqueeze(1)
        anchors = batch.anchors[batch.visible].unsqueeze(1)
        steps = torch.arange(1, self.spec.most + 1, device=self._device)  # slot 0 of DSpark's layout predicts step 1
        return rows.expand(-1, self.spec.most), anchors + steps


def initialise(network: DraftNetwork, parts: TargetParts) -> None:
    """Start from the target's own last layers, and from its last tap as the context."""
    spec = network.spec
    with torch.no_grad():
        network.fc.weight.normal_(std=0.3 / (len(spec.taps) * spec.hidden_size) ** 0.5)
        eye = torch.eye(spec.hidden_size, device=network.fc.weight.device)
        network.fc.weight[:, -spec.hidden_size :] += eye * 0.7
        network.norm.weight.copy_(parts.norm)
        last = parts.config.num_hidden_layers
        for number, layer in enumerate(network.layers):
            source = parts.layers[last - len(spec.layers) + number]
            own = dict(layer.named_parameters())
            for name, value in source.items():
                if name in own and own[name].shape == value.shape:
                    own[name].copy_(value)
