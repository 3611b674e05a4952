"""Tensor data of a GGUF file as float32, in row chunks, with the transforms that llama.cpp applied undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from engine.errors import ModelLoadError
from engine.hub.gguf_reader import GGUFFile, TensorInfo
from engine.hub.safetensors_writer import Float32

_CHUNK_ELEMENTS = 1 << 21  # floats that are dequantized at once: 8 MiB and its temporaries

_FLOATS: dict[GGMLQuantizationType, Callable[[npt.NDArray[np.uint8]], Float32]] = {
    GGMLQuantizationType.F32: lambda raw: raw.view("<f4"),
    GGMLQuantizationType.F16: lambda raw: raw.view("<f2").astype(np.float32),
    GGMLQuantizationType.F64: lambda raw: raw.view("<f8").astype(np.float32),
}

RowOrder = Callable[[int], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Transform:
    """How a stored tensor becomes the checkpoint's: reorder rows, then transpose, then add a constant."""

    row_order: RowOrder | None = None  # number of rows -> source row of each row
    transpose: bool = False
    add: float = 0.0


def rotary_unpermute(heads: int) -> Transform:
    """Undo llama.cpp's interleaving of the two rotary halves of each head (its `permute` for llama's q and k)."""

    def order(rows: int) -> npt.NDArray[np.int64]:
        if heads < 1 or rows % (2 * heads):
            raise ModelLoadError(f"a query or key matrix of {rows} rows does not divide into {heads} heads")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    return Transform(row_order=order)


class TensorSource:
    """Reads tensors of one open file."""

    def __init__(self, gguf: GGUFFile, file: BinaryIO) -> None:
        self._gguf = gguf
        self._file = file

    def check(self, info: TensorInfo) -> None:
        """Raise ModelLoadError unless the type can be dequantized and the data lies inside the file."""
        end = info.offset + self._rows(info) * self._row_bytes(info)
        if end > self._gguf.size:
            raise self._error(info, "runs past the end of the file: the file is cut off or broken")

    def whole(self, info: TensorInfo) -> Float32:
        """The tensor as stored, shape as in `info`."""
        return np.concatenate(list(self._chunks(info, None))).reshape(info.shape)

    def pieces(self, info: TensorInfo, transform: Transform) -> Iterator[Float32]:
        """The transformed tensor, cut along its first axis; only a transposed one is built as a whole."""
        if transform.transpose:
            yield np.ascontiguousarray(self.whole(info).T)
            return
        order = None if transform.row_order is None else transform.row_order(info.shape[0])
        for chunk in self._chunks(info, order):
            yield chunk + np.float32(transform.add) if transform.add else chunk

    def _chunks(self, info: TensorInfo, order: npt.NDArray[np.int64] | None) -> Iterator[Float32]:
        """Rows of the tensor ([rows, columns], one row for vectors) in pieces; whole when they are reordered."""
        rows, row_bytes = self._rows(info), self._row_bytes(info)
        if order is not None and len(info.shape) == 1:
            yield self._read(info, 0, 1)[0][order]
            return
        step = rows if order is not None else max(1, _CHUNK_ELEMENTS // info.shape[-1])
        for start in range(0, rows, step):
            chunk = self._read(info, start * row_bytes, min(step, rows - start))
            yield chunk if order is None else chunk[order]

    def _read(self, info: TensorInfo, skip: int, rows: int) -> Float32:
        length = rows * self._row_bytes(info)
        self._file.seek(info.offset + skip)
        data = self._file.read(length)
        if len(data) != length:
            raise self._error(info, "runs past the end of the file: the file is cut off or broken")
        kind = GGMLQuantizationType(info.kind)
        raw = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
        try:
            with np.errstate(all="ignore"):  # what overflows in a broken block is found just below
                values = _FLOATS[kind](raw) if kind in _FLOATS else dequantize(raw, kind)
        except NotImplementedError as error:
            raise self._error(info, f"has the type {kind.name}, which cannot be dequantized") from error
        if not np.isfinite(values).all():
            raise self._error(info, "holds infinities or NaN: the file is broken")
        return values

    def _rows(self, info: TensorInfo) -> int:
        rows = 1
        for size in info.shape[:-1]:
            rows *= size
        return rows

    def _row_bytes(self, info: TensorInfo) -> int:
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)]
        except (KeyError, ValueError) as error:
            raise self._error(info, f"has the unknown type {info.kind}") from error
        if info.shape[-1] % block:
            raise self._error(info, f"has rows of {info.shape[-1]} values, no multiple of its block of {block}")
        return info.shape[-1] // block * width

    def _error(self, info: TensorInfo, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self._gguf.path.name}: tensor {info.name} {message}")
