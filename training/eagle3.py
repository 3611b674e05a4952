"""EAGLE-3 as it is trained: chains of drafted tokens from many random anchors, each fed with the draft's own output.

"Training-time test" of arXiv 2503.01840: the first token of a chain is drafted from the target's feature, every later
one from what the draft itself put out before, over the true tokens. Its inference twin over paged pools is in
`engine/models/eagle3`; `tests/numeric` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from engine.models.eagle3.spec import Eagle3Spec
from training.batches import Batch
from training.dflash import Recipe
from training.loss import Labels, mixed_cross_entropy
from training.network import MLP, RMSNorm
from training.target import TargetParts


class Attention(nn.Module):
    """The four products, by the names of the published layer."""

    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        width, dim = spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(2 * width, spec.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(2 * width, spec.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(2 * width, spec.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(spec.num_heads * dim, width, bias=False)


class Layer(nn.Module):
    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec.hidden_size, spec.intermediate_size)


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Keys and values [B, kv heads, T, dim] that chains attend to."""

    key: torch.Tensor
    value: torch.Tensor


class Eagle3Network(nn.Module):
    """fc, one layer, a norm; embedding and head are the target's, and frozen.

    `feature_scale` [taps * width] divides the target's hidden states, so that every input of fc has about the same size
    and learns at the same pace; `folded` gives the published form, which takes the states as they are.
    """

    def __init__(self, spec: Eagle3Spec, feature_scale: torch.Tensor | None = None) -> None:
        super().__init__()
        assert not (spec.fc_norm or spec.norm_before_fc or spec.window or spec.attention_bias or spec.mlp_bias)
        self.spec = spec
        inputs = len(spec.taps) * spec.target_hidden_size
        self.fc = nn.Linear(inputs, spec.hidden_size, bias=False)
        self.midlayer = Layer(spec)
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.feature_scale: torch.Tensor
        self.register_buffer("feature_scale", torch.ones(inputs) if feature_scale is None else feature_scale)
        dims = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
        self._frequencies = float(str(dict(spec.rope)["rope_theta"])) ** (-dims / spec.head_dim)

    def forward(self, states: torch.Tensor, embedded: torch.Tensor, anchors: torch.Tensor, steps: int) -> torch.Tensor:
        """Last hidden states [B, A, steps, width] after 1, 2, ... tokens of A chains per sequence.

        `states` [B, S, taps * width] of the target, `embedded` [B, S, width] tokens, `anchors` [B, A] positions > 0 of
        the first tokens of the chains. Chains that run past S repeat its last token.
        """
        layer, length = self.midlayer, embedded.shape[1]
        anchors = anchors.clamp(min=1)  # of chains that do not exist
        feature = self.fc(states[:, :-1].float() / self.feature_scale)  # g of positions 0 to S - 2
        tokens = layer.input_layernorm(embedded)
        # Place i of the context holds token i + 1 with the feature of token i.
        context = torch.cat((tokens[:, 1:], layer.hidden_norm(feature)), dim=-1)
        places = torch.arange(length - 1, device=anchors.device).expand(len(anchors), -1)
        seen = places.unsqueeze(1) < anchors.unsqueeze(-1)  # [B, A, S - 1]: up to the anchor's own pair
        keys = self._keys(context, places)
        fed = feature.gather(1, (anchors - 1).unsqueeze(-1).expand(-1, -1, feature.shape[-1]))
        own: list[Keys] = []
        normed = []
        for step in range(steps):
            at = (anchors + step).clamp(max=length - 1)
            token = tokens.gather(1, at.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            both = torch.cat((token, layer.hidden_norm(fed)), dim=-1)
            if step:
                own.append(self._keys(both, anchors - 1 + step))
            fed, last = self._layer(both, fed, anchors - 1 + step, keys, seen, own)
            normed.append(last)
        return torch.stack(normed, dim=2)

    def folded(self) -> dict[str, torch.Tensor]:
        """The tensors of the published form."""
        tensors = {name: value.detach() for name, value in self.state_dict().items() if name != "feature_scale"}
        tensors["fc.weight"] = tensors["fc.weight"] / self.feature_scale
        return tensors

    def _keys(self, both: torch.Tensor, places: torch.Tensor) -> Keys:
        """Of [B, T, 2 * width] at places [B, T]."""
        attention = self.midlayer.self_attn
        shape = (self.spec.num_kv_heads, self.spec.head_dim)
        key = self._turned(attention.k_proj(both).unflatten(-1, shape), places)
        return Keys(key.transpose(1, 2), attention.v_proj(both).unflatten(-1, shape).transpose(1, 2))

    def _layer(
        self,
        both: torch.Tensor,
        fed: torch.Tensor,
        places: torch.Tensor,
        context: Keys,
        seen: torch.Tensor,
        own: list[Keys],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next step is fed, and the last hidden states, [B, A, width] both."""
        spec, layer = self.spec, self.midlayer
        query = self._turned(layer.self_attn.q_proj(both).unflatten(-1, (spec.num_heads, spec.head_dim)), places)
        # [B, kv heads, fold, A, dim]
        query = query.transpose(1, 2).unflatten(1, (spec.num_kv_heads, -1)) * spec.head_dim**-0.5
        scores = (query.flatten(2, 3) @ context.key.transpose(-1, -2)).float().unflatten(2, query.shape[2:4])
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        chain = [(query * part.key.unsqueeze(2)).sum(-1, keepdim=True).float() for part in own]
        weights = torch.cat((scores, *chain), dim=-1).softmax(-1).to(context.value.dtype)
        size = scores.shape[-1]
        out = (weights[..., :size].flatten(2, 3) @ context.value).unflatten(2, query.shape[2:4])
        for step, part in enumerate(own):
            out = out + weights[..., size + step, None] * part.value.unsqueeze(2)
        attended = layer.self_attn.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2))
        stream = (layer.hidden_norm(fed) if spec.norm_before_residual else fed) + attended
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        normed = self.norm(stream)
        return (normed if spec.norm_output else stream), normed

    def _turned(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [B, T, heads, dim] at places [B, T], rotated in halves."""
        angles = places.float().unsqueeze(-1) * self._frequencies.to(places.device)
        cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(2) for table in (angles.cos(), angles.sin()))
        left, right = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class Eagle3Task:
    """See `trainer.Task`."""

    def __init__(
        self,
        network: Eagle3Network,
        parts: TargetParts,
        vocabulary: torch.Tensor,
        columns: torch.Tensor,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        """`vocabulary` [draft vocabulary] target ids, rising; `columns`: those of the taps, then of the last layer."""
        self.network, self.columns = network, columns
        self._parts, self._recipe, self._device = parts, recipe, device
        self._embedding = parts.embedding.to(device)
        self._head = parts.head[vocabulary].to(device, torch.bfloat16)
        self._draft_ids = torch.full((len(parts.embedding),), -1, dtype=torch.int64)
        self._draft_ids[vocabulary] = torch.arange(len(vocabulary))
        self._draft_ids = self._draft_ids.to(device)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean loss, right [chains, steps] bool: the label was likeliest, inside [chains, steps] bool)."""
        spec, length = self.network.spec, batch.tokens.shape[1]
        features = len(spec.taps) * spec.target_hidden_size
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            embedded = functional.embedding(batch.tokens, self._embedding)
            hidden = self.network(batch.states[..., :features], embedded, batch.anchors, spec.most)
        hidden = hidden[batch.visible]  # [chains, steps, width]
        rows = batch.visible.nonzero()[:, :1].expand(-1, spec.most)
        at = batch.anchors[batch.visible].unsqueeze(1) + torch.arange(1, spec.most + 1, device=self._device)
        inside = at < batch.lengths[rows]
        at = at.clamp(max=length - 1)
        ids = self._draft_ids[batch.tokens[rows, at]]
        # The target's law at a label comes from its hidden state one position before.
        distinct, teacher_rows = (rows * length + at - 1).unique(return_inverse=True)
        with torch.no_grad():
            last = batch.states.flatten(0, 1)[distinct, features:]
            teacher = (self._parts.normed(last).to(torch.bfloat16) @ self._head.T).float()
        # A label that the draft cannot say still teaches the target's law over what it can.
        weights = torch.exp(-torch.arange(spec.most, device=self._device) / self._recipe.decay) * inside
        total, best = mixed_cross_entropy(
            hidden.flatten(0, 1),
            self._head,
            Labels(ids.flatten(), teacher, teacher_rows.flatten()),
            weights.flatten(),
            self._recipe.hard,
        )
        right = (best.view_as(ids) == ids) & inside
        return total / weights.sum().clamp(min=1.0), right, inside
