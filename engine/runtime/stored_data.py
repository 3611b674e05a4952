"""The two sides of a stored model's data: a keeper of tensors on the way out, a typed reader on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

Form = dict[str, object]  # as JSON holds it
_Kind = TypeVar("_Kind")


class Unstorable(Exception):
    """A part of the model is of a kind that can't be kept in a file; the text names it."""


class Keeper:
    """Collects tensors under names of its own; one that is handed in twice is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[int, torch.Size, torch.dtype], str] = {}

    def keep(self, tensor: torch.Tensor) -> str:
        """Its name."""
        plain = tensor.detach()
        key = (plain.data_ptr(), plain.shape, plain.dtype)
        if key not in self._names or not plain.is_contiguous():
            self._names[key] = f"tensor.{len(self.tensors)}"
            self.tensors[self._names[key]] = plain.contiguous()
        return self._names[key]

    def optional(self, tensor: torch.Tensor | None) -> str | None:
        """Its name, where there is one."""
        return None if tensor is None else self.keep(tensor)


class Reader:
    """One JSON object of a form, with the tensors that it names. All raise KeyError and TypeError."""

    def __init__(self, values: object, tensors: Mapping[str, torch.Tensor]) -> None:
        if not isinstance(values, dict):
            raise TypeError("an object is missing")
        self.values: dict[str, object] = values
        self._tensors = tensors

    def text(self, key: str) -> str:
        return _checked(self.values[key], str)

    def integer(self, key: str) -> int:
        return _checked(self.values[key], int)

    def number(self, key: str) -> float:
        value = self.values[key]
        return float(value if isinstance(value, int) else _checked(value, float))

    def optional_number(self, key: str) -> float | None:
        return None if self.values[key] is None else self.number(key)

    def texts(self, key: str) -> list[str]:
        return [_checked(item, str) for item in _checked(self.values[key], list)]

    def integers(self, key: str) -> list[int]:
        return [_checked(item, int) for item in _checked(self.values[key], list)]

    def child(self, key: str) -> Reader:
        return Reader(self.values[key], self._tensors)

    def children(self, key: str) -> dict[str, Reader]:
        return {name: Reader(value, self._tensors) for name, value in self.child(key).values.items()}

    def items(self, key: str) -> list[Reader]:
        return [Reader(item, self._tensors) for item in _checked(self.values[key], list)]

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor that stands under a name here."""
        return self._tensors[self.text(key)]

    def named_tensors(self, key: str) -> dict[str, torch.Tensor]:
        named = self.child(key)
        return {name: named.tensor(name) for name in named.values}

    def listed_tensors(self, key: str) -> list[torch.Tensor]:
        return [self._tensors[name] for name in self.texts(key)]

    def parameter(self, key: str) -> nn.Parameter:
        return nn.Parameter(self.tensor(key), requires_grad=False)

    def optional_parameter(self, key: str) -> nn.Parameter | None:
        return None if self.values[key] is None else self.parameter(key)


def _checked(value: object, kind: type[_Kind]) -> _Kind:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value
