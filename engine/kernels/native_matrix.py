"""The C structs of `gemm.h` and `gemm.c`, and the call of one whole product."""

from __future__ import annotations

from struct import Struct

import torch

from engine.kernels.native import Library

FORMATS = ("fp16", "int8", "int4")  # as `gemm.h` numbers them
PANEL = 32  # outputs that are stored together

# Field for field.
MATRIX = Struct("@2i2q4Pfi")
MULTIPLY = Struct("@3P3q2i")


def multiply(library: Library, matrix: int, x: torch.Tensor, outputs: int) -> torch.Tensor:
    """x [T, inputs] (it must fit, see `native.fits`) times the Matrix at this address -> [T, outputs] float32.

    Raises MemoryError if there is none for the rounded rows.
    """
    rows = x.shape[0]
    out = torch.empty(rows, outputs, dtype=torch.float32)
    failed = library.matrix_multiply(
        MULTIPLY.pack(matrix, x.data_ptr(), out.data_ptr(), x.stride()[0], outputs, rows, torch.get_num_threads(), 0)
    )
    if failed:
        raise MemoryError("no memory for the rounded rows of a matrix product")
    return out
