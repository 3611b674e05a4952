"""Frozen records that are cheap to make. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A dataclass that nobody changes, for what is made anew for every sequence of every step.

    The type checker holds that nothing is assigned to its fields; at run time nothing does, because that check is what
    most of a frozen dataclass's birth takes (15 fields: 1.5 microseconds, 0.2 without it; a step of 256 sequences makes
    a thousand of them). Equality, hash, `replace`, `asdict` and msgspec are those of a frozen dataclass with slots.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
