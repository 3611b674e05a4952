"""Weight matrices packed for the C kernels: fp16, int8, or int4 with minima. `gemm.h` gives the layout."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from engine.kernels import native, native_matrix, reference_matrix
from engine.kernels.library import library
from engine.kernels.native_matrix import FORMATS, MATRIX, PANEL

GROUPS = {"fp16": 0, "int8": 32, "int4": 32}  # inputs that share a scale
LAYOUT = 2  # counts the layouts of `gemm.h` and the ways to round: for what is kept in files


class PackedMatrix:
    """W [outputs, inputs] packed, and a bias: `multiply` computes x W^T + bias.

    The tensors may be views of a file; they must be contiguous and in this machine's memory.
    """

    def __init__(self, format: str, outputs: int, inputs: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """`tensors`: codes; scales and multiplier (int8, int4); minima (int4); bias (optional). See `tensors`."""
        self.format, self.outputs, self.inputs = format, outputs, inputs
        self.group = GROUPS[format]
        self._tensors = dict(tensors)
        _check(self)
        multiplier = tensors.get("multiplier")
        self.multiplier = 1.0 if multiplier is None else float(multiplier)
        addresses = [
            self._tensors[name].data_ptr() if name in tensors else 0 for name in ("codes", "scales", "minima", "bias")
        ]
        # The C struct Matrix, field for field (`MATRIX.pack`).
        self.fields = (FORMATS.index(format), self.group, outputs, inputs, *addresses, self.multiplier, 0)
        self._struct = ctypes.create_string_buffer(MATRIX.pack(*self.fields))
        self.address = ctypes.addressof(self._struct)  # of its C struct Matrix, which lives as long as this object

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds, by name; `PackedMatrix(format, outputs, inputs, tensors)` makes it again."""
        return dict(self._tensors)

    @classmethod
    def from_tensors(cls, format: str, outputs: int, inputs: int, tensors: Mapping[str, torch.Tensor]) -> PackedMatrix:
        """What `tensors` of such a matrix gave. Raises ValueError for tensors of other names, kinds or sizes."""
        return cls(format, outputs, inputs, tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def bias(self) -> torch.Tensor | None:
        return self._tensors.get("bias")

    def unpack(self) -> torch.Tensor:
        """W [outputs, inputs] float32 as these codes say."""
        return reference_matrix.unpack(self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] float32 -> [T, outputs] float32, each row for itself alone. Raises MemoryError."""
        assert x.ndim == 2 and x.shape[1] == self.inputs
        if native.fits(x) and (found := library()) is not None:
            return native_matrix.multiply(found, self.address, x, self.outputs)
        return reference_matrix.multiply(self, x)


def pack(weight: torch.Tensor, format: str, bias: torch.Tensor | None = None) -> PackedMatrix:
    """Round W [outputs, inputs] to a format of `FORMATS`. Raises ValueError for what the format can't hold."""
    tensors = reference_matrix.pack(weight.detach(), format, GROUPS[format], PANEL)
    if bias is not None:
        tensors["bias"] = bias.detach().float().contiguous().clone()
    outputs, inputs = weight.shape
    return PackedMatrix(format, outputs, inputs, tensors)


def _check(matrix: PackedMatrix) -> None:
    panels = -(-matrix.outputs // PANEL)
    if matrix.format == "fp16":
        wanted = {"codes": (panels * matrix.inputs * PANEL, torch.float16)}
    else:
        groups = -(-matrix.inputs // matrix.group)
        half = 2 if matrix.format == "int4" else 1
        wanted = {
            "codes": (panels * groups * matrix.group * PANEL // half, torch.uint8),
            "scales": (panels * groups * PANEL, torch.float16),
            "multiplier": (1, torch.float32),
        }
        if matrix.format == "int4":
            wanted["minima"] = wanted["scales"]
    found = matrix.tensors()
    if "bias" in found:
        wanted["bias"] = (matrix.outputs, torch.float32)
    if found.keys() != wanted.keys():
        raise ValueError(f"a matrix in {matrix.format} has {', '.join(wanted)}, not {', '.join(found)}")
    for name, (size, dtype) in wanted.items():
        tensor = found[name]
        if tensor.numel() != size or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{name} of a matrix in {matrix.format} must be {size} contiguous numbers of {dtype}")
