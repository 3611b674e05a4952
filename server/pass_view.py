"""What `--show-passes` shows: how an answer was denoised, and in how many forward passes."""

from __future__ import annotations

import msgspec


class Passes(msgspec.Struct):
    """An answer's `diffusion`."""

    rule: str = ""
    knobs: dict[str, float] = msgspec.field(default_factory=dict)
    cache: str = ""
    block_length: int = 0
    canvas: int = 0
    forwards: int = 0
    draft_forwards: int = 0
    verifies: int = 0
    remasked: int = 0
    tokens_per_forward: float = 0.0


def describe(passes: Passes | None) -> str:
    """One line to print below the answer."""
    if passes is None:
        return "[this server does not tell how it denoises]"
    knobs = "".join(f", {name} {value:g}" for name, value in passes.knobs.items())
    how = f"rule {passes.rule}{knobs}; cache {passes.cache}; blocks of {passes.block_length}; canvas {passes.canvas}"
    drafted = f" and {passes.draft_forwards} of its drafter" if passes.draft_forwards else ""
    taken = f"; {passes.verifies} verified, and took back {passes.remasked} tokens" if passes.verifies else ""
    each = f"{passes.tokens_per_forward:.2f} tokens each"
    return f"[{how}: {passes.forwards} forward passes{drafted}, {each}{taken}]"
