"""The draft network of DFlash as it is trained: many random anchors of a sequence in one pass.

The published network (arXiv 2602.06036), with its tensors' names. Its inference twin over paged pools is in
`engine/models/dflash`; `tests/numeric` compares the two.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from engine.models.dflash.spec import DFlashSpec


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Block queries over the context's and their own block's keys."""

    def __init__(self, spec: DFlashSpec) -> None:
        super().__init__()
        width, dim = spec.hidden_size, spec.head_dim
        self.heads, self.kv_heads, self.dim = spec.num_heads, spec.num_kv_heads, dim
        self.q_proj = nn.Linear(width, spec.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, spec.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, spec.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(spec.num_heads * dim, width, bias=False)
        self.q_norm = RMSNorm(dim, spec.rms_norm_eps)
        self.k_norm = RMSNorm(dim, spec.rms_norm_eps)

    def forward(self, x: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor) -> torch.Tensor:
        """x [B, Q, width] block inputs, context [B, S, width]; mask [B, 1, Q, S + Q] bool -> [B, Q, width]."""
        batch, queries, _ = x.shape
        both = torch.cat((context, x), dim=1)
        query = self.q_norm(self.q_proj(x).view(batch, queries, self.heads, self.dim))
        key = self.k_norm(self.k_proj(both).view(batch, -1, self.kv_heads, self.dim))
        value = self.v_proj(both).view(batch, -1, self.kv_heads, self.dim)
        query, key = rope.turn(query, rope.block), rope.turn(key, rope.all)
        dtype = value.dtype
        out = functional.scaled_dot_product_attention(
            query.to(dtype).transpose(1, 2),
            key.to(dtype).transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1),
            value.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, 1),
            attn_mask=mask,
        )
        merged: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return merged


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, spec: DFlashSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec.hidden_size, spec.intermediate_size)

    def forward(self, x: torch.Tensor, context: torch.Tensor, rope: Rope, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rope, mask)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Rope:
    """cos and sin of the positions of the block's slots [B, Q] and of all keys [B, S + Q]."""

    def __init__(self, theta: float, dim: int, block: torch.Tensor, everything: torch.Tensor) -> None:
        self._frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=block.device) / dim)
        self.block, self.all = self._table(block), self._table(everything)

    def _table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float().unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)  # [B, T, 1, dim]
        return angles.cos(), angles.sin()

    @staticmethod
    def turn(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [B, T, heads, dim], rotated in halves."""
        left, right = x.chunk(2, dim=-1)
        return x * table[0] + torch.cat((-right, left), dim=-1) * table[1]


class MarkovHead(nn.Module):
    """DSpark's low-rank bias from the token before: logits += W1[previous] @ W2.T (arXiv 2607.05147)."""

    def __init__(self, spec: DFlashSpec) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(spec.vocab_size, spec.markov_rank)
        self.markov_w2 = nn.Linear(spec.markov_rank, spec.draft_vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)


class DraftNetwork(nn.Module):
    """fc, its norm, the layers and the last norm. Embedding and head are the target's, and frozen.

    `feature_scale` [taps * width] divides the target's hidden states, so that every input of fc has about the same size
    and learns at the same pace; `folded` gives the published form, which takes the states as they are.
    """

    def __init__(self, spec: DFlashSpec, feature_scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        width = spec.hidden_size
        self.fc = nn.Linear(len(spec.taps) * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, spec.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(spec) for _ in spec.layers)
        self.norm = RMSNorm(width, spec.rms_norm_eps)
        self.markov_head = MarkovHead(spec) if spec.markov_rank else None
        scale = torch.ones(len(spec.taps) * width) if feature_scale is None else feature_scale
        self.feature_scale: torch.Tensor
        self.register_buffer("feature_scale", scale)
        self.theta = float(str(dict(spec.rope)["rope_theta"]))

    def forward(self, states: torch.Tensor, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, A * slots, width] of A blocks per sequence.

        `states` [B, S, taps * width] of the target; `inputs` [B, A * slots, width] embedded anchors and masks;
        `positions` [B, A] of the anchors.
        """
        slots = self.spec.block_size
        batch, length, _ = states.shape
        anchors = positions.shape[1]
        context = self.hidden_norm(self.fc(states.float() / self.feature_scale))
        at = (positions.unsqueeze(-1) + torch.arange(slots, device=positions.device)).flatten(1)
        context_at = torch.arange(length, device=positions.device).expand(batch, -1)
        rope = Rope(self.theta, self.spec.head_dim, at, torch.cat((context_at, at), dim=1))
        # Strictly before the anchor: at inference the target has not seen the anchor yet.
        before = context_at.unsqueeze(1) < positions.unsqueeze(-1)  # [B, A, S]
        before = before.repeat_interleave(slots, 1)
        block = torch.arange(anchors, device=positions.device).repeat_interleave(slots)
        own = (block.unsqueeze(0) == block.unsqueeze(1)).expand(batch, -1, -1)  # each block sees itself, both ways
        mask = torch.cat((before, own), dim=2).unsqueeze(1)
        x = inputs
        for layer in self.layers:
            x = layer(x, context, rope, mask)
        out: torch.Tensor = self.norm(x)
        return out

    def folded(self) -> dict[str, torch.Tensor]:
        """The tensors of the published form."""
        tensors = {name: value for name, value in self.state_dict().items() if name != "feature_scale"}
        tensors["fc.weight"] = self.fc.weight.detach() / self.feature_scale
        return tensors
