"""What the kernel tests run and find, as plain data: it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call of attention. `lengths` are (query length, kv length) of each sequence.

    `tile` (rows, keys) and `splits` stand in for the chosen ones. `bound` is added to the kv lengths that the host is
    told.
    Every other sequence of mode tree is a random tree of its queries, of which the first `grown` were fed earlier.
    """

    mode: str = "causal"
    lengths: tuple[tuple[int, int], ...] = ((1, 9), (5, 43), (2, 3), (17, 21))
    page: int = 16
    kv_heads: int = 1
    fold: int = 3
    dims: tuple[int, int] = (24, 16)  # of keys, of values
    dtype: str = "float32"
    pool: str = ""  # its type, where it is another
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    tile: tuple[int, int] | None = None
    splits: int | None = None
    processors: int = 132
    bound: int = 0
    grown: int = 0
    bounded: bool = False  # planned on the device; all queries have one length


@dataclass(frozen=True)
class Report:
    """How a call went: the largest error relative to the reference's largest output, and how the work was cut."""

    error: float
    launches: int
    splits: int  # most of any tile


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for a GPU that is not there."""

    kernel: str
    tile: tuple[int, int, int]  # rows, keys, warps
    registers: int
    stack: int  # bytes of spilled registers and local arrays, per thread
    shared: int  # bytes
    wgmma: int
    mma: int
    async_copies: int
    binary: int  # bytes

    def row(self) -> str:
        tile = "x".join(map(str, self.tile))
        return (
            f"{self.kernel:16} {tile:10} {self.registers:4} registers {self.stack:3} B stack {self.shared:6} B shared "
            f"{self.wgmma:3} wgmma {self.mma:3} mma {self.async_copies:3} async copies"
        )
