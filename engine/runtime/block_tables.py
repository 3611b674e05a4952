"""Block tables of a batch as one array, kept from step to step: only what changed is written."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not

import numpy as np
import numpy.typing as npt

Tables = npt.NDArray[np.int32]


class BlockTables:
    """Rows of the last batch, to make those of the next one from. Tables are known again by identity."""

    def __init__(self) -> None:
        self._held: list[Sequence[int]] = []
        self._rows: Tables = np.zeros((1, 1), dtype=np.int32)  # 0 behind each table's end, as far as rows are held
        self._width = 0

    def rows(self, tables: Sequence[Sequence[int]]) -> Tables:
        """A fresh array [n, longest], padded with 0."""
        if len(tables) != len(self._held) or any(map(is_not, tables, self._held)):
            self._take(tables)
        return self._rows[: len(tables), : self._width].copy()

    def _take(self, tables: Sequence[Sequence[int]]) -> None:
        self._width = max(map(len, tables), default=0)
        self._reserve(len(tables), self._width)
        places = {id(table): row for row, table in enumerate(self._held)}
        sources = np.array([places.get(id(table), -1) for table in tables], dtype=np.int64)
        targets = np.flatnonzero((sources >= 0) & (sources != np.arange(len(tables))))
        if len(targets):
            self._rows[targets] = self._rows[sources[targets]]
        for row in np.flatnonzero(sources < 0).tolist():
            self._write(row, tables[row], self._held[row] if row < len(self._held) else ())
        # A list may change under its owner's hands: what is held in its place is never met again.
        self._held = [table if type(table) is tuple else tuple(table) for table in tables]

    def _write(self, row: int, table: Sequence[int], before: Sequence[int]) -> None:
        """A new table, or one that grew out of the one that stood here `before`."""
        known = len(before) if table[: len(before)] == before else 0
        self._rows[row, known : len(table)] = table[known:]
        self._rows[row, len(table) :] = 0

    def _reserve(self, count: int, width: int) -> None:
        rows, columns = self._rows.shape
        if count > rows or width > columns:
            larger = np.zeros((max(rows, _power(count)), max(columns, _power(width))), dtype=np.int32)
            larger[:rows, :columns] = self._rows
            self._rows = larger


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
