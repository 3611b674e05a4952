"""A plain Llama as it is trained for masked diffusion: a whole canvas both ways, or noisy blocks over clean ones.

Tensor names are those of Hugging Face's Llama below `model.`; embedding and head are one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from training.network import MLP

KeyValue = tuple[torch.Tensor, torch.Tensor]  # [B, heads, T, head_dim] each, keys rotated


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network. `max_positions` in tokens, prompt and answer together."""

    vocab: int = 512
    hidden: int = 160
    inner: int = 448
    layers: int = 5
    heads: int = 5
    head_dim: int = 32
    theta: float = 10_000.0
    eps: float = 1e-5
    max_positions: int = 512


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dim = shape.heads, shape.head_dim
        inner = shape.heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.k_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.v_proj = nn.Linear(shape.hidden, inner, bias=False)
        self.o_proj = nn.Linear(inner, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, rope: KeyValue, mask: torch.Tensor | None, past: KeyValue | None) -> _Attended:
        """x [B, T, hidden], mask [*, 1, T, S + T] bool over `past`'s S rows and its own."""
        query, key, value = (self._heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key = _turn(query, rope), _turn(key, rope)
        own = key, value
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        # Written out: on CPUs the backward pass of the fused kernel takes twice as long at these sizes.
        scores = (query * self.dim**-0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1).to(value.dtype) @ value
        return self.o_proj(out.transpose(1, 2).flatten(2)), own

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.dim)).transpose(1, 2)


_Attended = tuple[torch.Tensor, KeyValue]


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape.hidden, shape.inner)

    def forward(self, x: torch.Tensor, rope: KeyValue, mask: torch.Tensor | None, past: KeyValue | None) -> _Attended:
        attended, own = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if deep else 0.02)

    def forward(
        self,
        ids: torch.Tensor,
        start: int = 0,
        mask: torch.Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Hidden states [B, T, hidden] of ids [B, T] at positions start.., and the rows' keys and values by layer.

        `mask` [1 or B, 1, T, S + T] bool: what a row sees of the S rows of `past` and of its own; None: everything.
        """
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        rope = self._rope(positions)
        x, kept = self.embed_tokens(ids), []
        for number, layer in enumerate(self.layers):
            x, own = layer(x, rope, mask, None if past is None else past[number])
            kept.append(own)
        return self.norm(x), kept

    def denoise(self, clean: torch.Tensor, noisy: torch.Tensor, block: int) -> torch.Tensor:
        """Block-causal training: hidden states [copies * B, T, hidden] of noisy copies of the last T of L clean tokens.

        clean [B, L], noisy [copies * B, T]; L and T are whole blocks. One pass over the clean tokens serves all copies:
        a noisy block sees itself both ways and the clean blocks before it, a clean block sees itself and those before.
        """
        length, tail = clean.shape[1], noisy.shape[1]
        copies = noisy.shape[0] // clean.shape[0]
        over_clean, over_both = block_masks(length, tail, block, clean.device)
        _, context = self(clean, 0, over_clean)
        past = [(key.repeat(copies, 1, 1, 1), value.repeat(copies, 1, 1, 1)) for key, value in context]
        hidden: torch.Tensor = self(noisy, length - tail, over_both, past)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., vocab] of hidden states [..., hidden]."""
        return functional.linear(hidden, self.embed_tokens.weight)

    def _rope(self, positions: torch.Tensor) -> KeyValue:
        dim = self.shape.head_dim
        frequencies = self.shape.theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def block_masks(length: int, tail: int, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Who sees whom, bool: clean rows over clean ones [1, 1, L, L], noisy rows over clean and noisy [1, 1, T, L + T].

    Together the three parts of block-diffusion training (BD3-LM, section 3.2): block-causal among clean rows; noisy
    over the clean blocks strictly before; noisy over its own block alone.
    """
    blocks = torch.arange(length, device=device) // block
    noisy = blocks[length - tail :]
    over_clean = blocks.unsqueeze(1) >= blocks.unsqueeze(0)
    over_both = torch.cat((noisy.unsqueeze(1) > blocks.unsqueeze(0), noisy.unsqueeze(1) == noisy.unsqueeze(0)), dim=1)
    return over_clean[None, None], over_both[None, None]


def _turn(x: torch.Tensor, rope: KeyValue) -> torch.Tensor:
    """x [B, heads, T, dim], rotated in halves."""
    cosine, sine = (table.to(x.dtype) for table in rope)
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine
