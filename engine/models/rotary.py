"""cos and sin of rotary embeddings: by plain arithmetic where that is all there is to it, else by `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

LAYOUTS = ("halves twice", "neighbours twice", "once")  # of cos and sin over the frequencies
Compute = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def angles(
    positions: torch.Tensor, frequencies: torch.Tensor, scaling: float = 1.0, layout: str = LAYOUTS[0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, n], times `scaling`, of positions [1, T]; n is twice the frequencies, or as many ("once")."""
    turned = positions[..., None].float() * frequencies.to(positions.device, torch.float32)
    if layout == "halves twice":
        turned = torch.cat((turned, turned), dim=-1)
    elif layout == "neighbours twice":
        turned = turned.repeat_interleave(2, dim=-1)
    return turned.cos() * scaling, turned.sin() * scaling


def rotary_of(parameters: Mapping[str, object], head_dim: int, length: int) -> Compute:
    """positions [1, T] -> cos, sin [1, T, head_dim] as a Llama with these `rope_parameters` computes them.

    `length` is its max_position_embeddings. Raises KeyError, TypeError and ValueError for parameters that are unfit.
    """
    if parameters.get("rope_type") == "default":
        theta = parameters["rope_theta"]
        assert isinstance(theta, int | float)
        steps = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        frequencies = 1.0 / (theta**steps)
        return lambda positions: angles(positions, frequencies)
    from transformers import LlamaConfig  # costs seconds of a start, and knows the scaled kinds
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={key: _thawed(value) for key, value in parameters.items()},
    )
    rotary, like = LlamaRotaryEmbedding(config), torch.empty(0)

    def compute(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary.to(positions.device)(like, positions)
        return cos, sin

    return compute


def _thawed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
