"""The demo model's file holds Q4_1 blocks, and Q8_0 ones in its table: packing keeps them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.kernels.matrix import pack


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("model.embed_tokens.weight", "int8"),
        ("model.layers.0.self_attn.q_proj.weight", "int4"),  # its rows stand in another order in the file
        ("model.layers.17.mlp.gate_proj.weight", "int4"),
        ("model.layers.29.mlp.down_proj.weight", "int4"),
    ],
)
def test_packed_weights_are_the_files_own(demo_folder: Path, name: str, format: str) -> None:
    with safe_open(demo_folder / "model.safetensors", "pt") as file:
        weight: torch.Tensor = file.get_tensor(name)[:2048]
    assert weight.dtype is torch.float32
    assert torch.equal(pack(weight, format).unpack(), weight)
