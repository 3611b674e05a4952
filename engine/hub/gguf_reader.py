"""A bounded reader of GGUF headers (versions 2 and 3, little-endian): metadata and the tensor index.

GGUF files come from anywhere, so every count and length is checked against the bytes that are left before it is
used; a broken file is a ModelLoadError, never a crash or an endless loop. Layout: the GGUF specification of ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from engine.errors import ModelLoadError

_MAGIC = 0x46554747  # "GGUF"
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_MAX_ITEMS = 1 << 24  # of one array, and bytes of one text: far above any real vocabulary or template
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in numpy order (rows first); `kind` is ggml's type number; `offset` is absolute."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed header. Values of `metadata` are str, int, float, bool or lists of those."""

    path: Path
    size: int
    metadata: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return self.string("general.architecture")

    def string(self, key: str, default: str | None = None) -> str:
        """Text of a key. Raises ModelLoadError when it is absent without a default, or no text."""
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Whole number of a key; a list of equal numbers (one per layer) counts as that number."""
        value = self.metadata.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelLoadError(f"{self.path.name}: {key} is {_show(value)}, expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Number of a key, as the shortest decimal that gives the stored float32 (1e-05, not 9.99999e-06)."""
        value = self.metadata.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ModelLoadError(f"{self.path.name}: {key} is {_show(value)}, expected a number")
        return shortest(value)

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, bool, default)

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelLoadError(f"{self.path.name}: {key} is {_show(value)}, expected a list of texts")
        return value

    def numbers(self, key: str) -> list[float]:
        """Numbers of a list; an absent key is an empty list."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise ModelLoadError(f"{self.path.name}: {key} is {_show(value)}, expected a list of numbers")
        return value

    def _typed(self, key: str, kind: type[T], default: T | None) -> T:
        value = self.metadata.get(key, default)
        if not isinstance(value, kind):
            raise ModelLoadError(f"{self.path.name}: {key} is {_show(value)}, expected {kind.__name__}")
        return value


def read_gguf(path: Path) -> GGUFFile:
    """Parse the header of `path`. Raises ModelLoadError for anything that is no complete, little-endian GGUF."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Parser(file, path, size).parse()
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from error


def shortest(value: float) -> float:
    """The float64 with the shortest decimal form among those that round to the float32 nearest to `value`."""
    return float(str(np.float32(value)))


class _Parser:
    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.position = 0

    def parse(self) -> GGUFFile:
        if self.size < 24 or self.scalar("<I") != _MAGIC:
            raise self.error("not a GGUF file")
        version = int(self.scalar("<I"))
        if version not in (2, 3):
            hint = " (big-endian files are not supported)" if version and version & 0xFFFF == 0 else ""
            raise self.error(f"GGUF version {version} is not supported{hint}")
        tensor_count, key_count = self.count(24), self.count(12)
        metadata: dict[str, object] = {}
        for _ in range(key_count):
            key = self.text()
            if key in metadata:
                raise self.error(f"metadata key {key[:80]!r} occurs twice")
            metadata[key] = self.value(int(self.scalar("<I")), 0)
        headers = [self.tensor_header() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"alignment {_show(alignment)} is no power of two")
        start = -(-self.position // alignment) * alignment
        tensors = {name: TensorInfo(name, shape, kind, start + at) for name, shape, kind, at in headers}
        if len(tensors) != tensor_count:
            raise self.error("two tensors share one name")
        return GGUFFile(self.path, self.size, metadata, tensors)

    def tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        dimensions = int(self.scalar("<I"))
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(int(self.scalar("<Q")) for _ in range(dimensions))[::-1]
        kind, offset = int(self.scalar("<I")), int(self.scalar("<Q"))
        if min(shape) < 1 or math.prod(shape) > 8 * self.size:  # the smallest types take above one bit an element
            raise self.error(f"tensor {name[:80]!r} of shape {shape} does not fit the file: it is cut off or broken")
        return name, shape, kind, offset

    def value(self, kind: int, depth: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth >= _MAX_ARRAY_DEPTH:
            raise self.error(f"metadata of unknown type {kind}")
        item = int(self.scalar("<I"))
        if item in _SCALARS:
            code = _SCALARS[item]
            width = struct.calcsize(code)
            data = self.take(self.items(width) * width)
            return np.frombuffer(data, dtype=np.bool_ if item == _BOOL else np.dtype(code)).tolist()
        return [self.value(item, depth + 1) for _ in range(self.items(8))]

    def count(self, least: int) -> int:
        """A number of things of at least `least` bytes each; more than fit the rest of the file is an error."""
        number = int(self.scalar("<Q"))
        if number > (self.size - self.position) // least:
            raise self.error("a count runs past the end of the file: it is cut off or broken")
        return number

    def items(self, least: int) -> int:
        number = self.count(least)
        if number > _MAX_ITEMS:
            raise self.error(f"an array or text of {number} items is too long")
        return number

    def text(self) -> str:
        data = self.take(self.items(1))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a text in the header is not UTF-8") from error

    def scalar(self, code: str) -> float:
        value: float = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def take(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) != length:
            raise self.error("the header runs past the end of the file: it is cut off or broken")
        self.position += length
        return data

    def error(self, message: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path.name}: {message}")


def _show(value: object) -> str:
    return "absent" if value is None else f"{type(value).__name__} {value!r}"[:80]
