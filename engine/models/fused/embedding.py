"""Embedding tables that are not kept in fp32: as fp16 rows, or as the packed weights of a tied output head."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.matrix import PackedMatrix
from engine.kernels.matrix_rows import rows


class PackedEmbedding(nn.Module):
    """ids [...] -> `scale` times rows of a packed matrix [vocabulary, width], [..., width] float32.

    Of a model with tied embeddings the matrix is its head's, so that the table takes no memory at all.
    """

    def __init__(self, matrix: PackedMatrix, scale: float = 1.0) -> None:
        super().__init__()
        self.matrix = matrix
        self.scale = scale
        self.num_embeddings, self.embedding_dim = matrix.outputs, matrix.inputs

    @property
    def weight(self) -> torch.Tensor:
        """[vocabulary, width] float32 as rounded and without `scale`, unpacked at every read."""
        return self.matrix.unpack()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = rows(self.matrix, ids.reshape(-1)).view(*ids.shape, self.embedding_dim)
        return found if self.scale == 1.0 else found * self.scale


class HalfEmbedding(nn.Module):
    """ids [...] -> `scale` times rows of `table` [vocabulary, width] float16, [..., width] float32."""

    def __init__(self, table: torch.Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Buffer(table, persistent=False)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = table.shape

    @property
    def weight(self) -> torch.Tensor:
        """[vocabulary, width] float32 as rounded and without `scale`, made at every read."""
        return self.table.float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.table[ids].float()
        return found if self.scale == 1.0 else found * self.scale
